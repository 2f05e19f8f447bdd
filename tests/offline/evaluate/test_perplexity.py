"""Perplexity equals a direct computation, for both protocols."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from offline.evaluate.perplexity import evaluate_perplexity, model_perplexity, perplexity, sequence_nll
from offline.evaluate.sequences import Sequences
from resq_vllm.errors import ResQError
from tests.offline.models.tiny import VOCAB, random_sequences, save_tiny, tiny_model, tiny_tokenizer


def direct_nll(model: torch.nn.Module, ids: tuple[int, ...]) -> float:
    """−Σ log p, one sequence at a time, token by token in float64."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].double()
    probabilities = logits.softmax(-1)
    return -sum(math.log(float(probabilities[t, ids[t + 1]])) for t in range(len(ids) - 1))


def sequences(lengths: list[int], protocol: str) -> Sequences:
    ids = tuple(tuple(s[0].tolist()) for s in random_sequences(lengths))
    return Sequences("random", protocol, ids, max(lengths))  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["llama", "mistral-window"])
def test_likelihoods_equal_a_direct_computation_whatever_the_batch(family: str) -> None:
    model, data = tiny_model(family), sequences([40, 7, 128, 128, 2, 90, 33] * 6, "texts")
    nll = sequence_nll(model, data, progress=False)
    assert nll == pytest.approx([direct_nll(model, ids) for ids in data.ids], rel=1e-5)


def test_windows_average_windows_and_texts_average_tokens() -> None:
    model = tiny_model("llama")
    windows, texts = sequences([30, 30, 30], "windows"), sequences([5, 60, 11], "texts")
    by_window = [direct_nll(model, ids) / 29 for ids in windows.ids]
    result = model_perplexity(model, windows, progress=False)
    assert result.value == pytest.approx(math.exp(sum(by_window) / 3), rel=1e-5)
    assert (result.sequences, result.tokens, result.seqlen) == (3, 87, 30)
    total = sum(direct_nll(model, ids) for ids in texts.ids)
    assert model_perplexity(model, texts, progress=False).value == pytest.approx(math.exp(total / 73), rel=1e-5)


def test_uniform_predictions_have_the_vocabulary_as_perplexity() -> None:
    model = tiny_model("llama-bias")
    torch.nn.init.zeros_(model.lm_head.weight)
    assert model_perplexity(model, sequences([20, 9], "texts"), progress=False).value == pytest.approx(VOCAB)


def test_protocols_differ_for_unequal_lengths() -> None:
    assert perplexity([1.0, 12.0], sequences([2, 5], "texts")).value == pytest.approx(math.exp(13 / 5))
    assert perplexity([1.0, 12.0], sequences([2, 5], "windows")).value == pytest.approx(math.exp((1 + 3) / 2))


def test_likelihood_that_is_not_a_number() -> None:
    with pytest.raises(ResQError, match="the model gives NaN for sequence 1 of random"):
        perplexity([1.0, math.nan], sequences([3, 3], "windows"))


def test_ruined_model_has_infinite_perplexity() -> None:
    assert perplexity([5000.0], sequences([3], "windows")).value == math.inf


def test_folder_and_files_end_to_end(tmp_path: Path) -> None:
    model = save_tiny("llama-bias", tmp_path)
    tiny_tokenizer(bos=False).save_pretrained(tmp_path)
    words = [f"w{(7 * i) % 62}" for i in range(100)]
    (tmp_path / "a.txt").write_text(" ".join(words))
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": " ".join(words[i : i + 9])}) for i in (0, 30, 50)))
    ids = [2 + (7 * i) % 62 for i in range(100)]
    windows = [tuple(ids[i : i + 20]) for i in range(0, 100, 20)]
    expected = math.exp(sum(direct_nll(model, w) / 19 for w in windows) / 5)
    found = evaluate_perplexity(tmp_path, str(tmp_path / "a.txt"), seqlen=20, progress=False)
    assert found.value == pytest.approx(expected, rel=1e-5)
    assert (found.dataset, found.protocol) == ("a.txt", "windows")
    texts = [tuple(ids[i : i + 9]) for i in (0, 30)]
    expected = math.exp(sum(direct_nll(model, t) for t in texts) / 16)
    found = evaluate_perplexity(tmp_path, str(tmp_path / "a.jsonl"), limit=2, progress=False)
    assert found.value == pytest.approx(expected, rel=1e-5)
