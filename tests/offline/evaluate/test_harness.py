"""Models as lm-eval sees them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance

from offline.bundled import MODEL_DIR
from offline.evaluate.harness import CausalModel, torch_lm
from offline.evaluate.perplexity import sequence_nll
from offline.evaluate.reference_model import load_reference_model
from offline.evaluate.sequences import Sequences
from offline.models.tokenizer import load_tokenizer

PROMPT = "def add(a, b):\n    return"


@pytest.fixture(scope="module")
def model() -> Any:
    return load_reference_model(MODEL_DIR)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(MODEL_DIR)


def wrapped(model: Any) -> CausalModel:
    return CausalModel(model.config, lambda ids: model(input_ids=ids, use_cache=False).logits, "cpu")


def request(kind: str, *arguments: object) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def test_likelihood_is_that_of_our_perplexity(model: Any, tokenizer: Any) -> None:
    context, continuation = tokenizer(PROMPT)["input_ids"], tokenizer(" a + b\n", add_special_tokens=False)["input_ids"]
    whole = tuple(context + continuation)
    nll = [
        sequence_nll(model, Sequences("x", "texts", (ids,), 64), progress=False)[0] for ids in (whole, tuple(context))
    ]
    for candidate in (model, wrapped(model)):
        lm = torch_lm(candidate, tokenizer)
        ((value, _),) = lm.loglikelihood([request("loglikelihood", PROMPT, " a + b\n")])
        assert value == pytest.approx(nll[1] - nll[0], abs=1e-3)


def test_generation_without_a_cache_is_that_with_one(
    model: Any, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False}
    expected = torch_lm(model, tokenizer).generate_until([request("generate_until", PROMPT, settings)])
    with caplog.at_level(logging.WARNING, logger="resq"):
        found = torch_lm(wrapped(model), tokenizer).generate_until([request("generate_until", PROMPT, settings)])
    assert found == expected
    assert found[0].strip()
    assert "without a KV cache" in caplog.text


def test_sampling_and_batches_are_refused(model: Any) -> None:
    ids = torch.zeros(2, 3, dtype=torch.long)
    for arguments in ({"input_ids": ids}, {"input_ids": ids[:1], "do_sample": True}):
        with pytest.raises(ValueError, match="one sequence at a time, greedily"):
            wrapped(model).generate(max_length=5, stopping_criteria=lambda *_: True, **arguments)


def test_quantization_config_of_ours_does_not_reach_transformers(tokenizer: Any) -> None:
    model = load_reference_model(Path(MODEL_DIR))
    config = model.config
    config.quantization_config = {"quant_method": "resq"}
    lm = torch_lm(model, tokenizer)
    assert lm.max_length == config.max_position_embeddings
    assert config.quantization_config == {"quant_method": "resq"}
