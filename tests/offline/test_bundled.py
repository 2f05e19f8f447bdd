"""The bundled model, tokenizer and texts are what their README says."""

import json
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import LlamaForCausalLM

from offline.bundled import BUNDLED_DIR, CALIBRATION_TEXT, HELDOUT_TEXT, MODEL_DIR
from offline.bundled.corpus import (
    HELDOUT_MODULES,
    Corpus,
    Document,
    build_corpus,
    calibration_text,
    fingerprint,
    paragraphs,
)
from offline.bundled.heldout import heldout_perplexity, heldout_windows
from offline.bundled.tokenizer import load_tokenizer
from offline.bundled.train import (
    BATCH_TOKENS,
    STAGES,
    WARMUP_STEPS,
    Progress,
    batches,
    learning_rate,
    model_config,
    spread_gains,
)
from resq_vllm.errors import ResQError

HELDOUT_PERPLEXITY = 23.11  # measured in float32; README.md
TOLERANCE = 1.02


@cache
def tokenizer() -> Any:
    return load_tokenizer(MODEL_DIR)


@cache
def model() -> Any:
    return LlamaForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()


@cache
def heldout() -> str:
    return HELDOUT_TEXT.read_text(encoding="utf-8")


@cache
def calibration() -> str:
    return CALIBRATION_TEXT.read_text(encoding="utf-8")


def fingerprints(text: str) -> set[str]:
    return {mark for part in paragraphs(text) if (mark := fingerprint(part))}


def complete(prompt: str, tokens: int = 64) -> str:
    ids = tokenizer()(prompt, return_tensors="pt")["input_ids"]
    output = model().generate(ids, max_new_tokens=tokens, do_sample=False)
    return str(tokenizer().decode(output[0, ids.shape[1] :], skip_special_tokens=True))


def test_weights_take_at_most_12_megabytes() -> None:
    assert (MODEL_DIR / "model.safetensors").stat().st_size <= 12_000_000


def test_architecture_is_the_documented_one() -> None:
    config = json.loads((MODEL_DIR / "config.json").read_text(encoding="utf-8"))
    facts = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 4096,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }
    assert {key: config[key] for key in facts} == facts
    assert config["rope_parameters"] == {"rope_theta": 10000.0, "rope_type": "default"}


def test_weights_are_bf16_finite_and_tied() -> None:
    parameters = 0
    with safe_open(MODEL_DIR / "model.safetensors", framework="pt") as weights:
        names = set(weights.keys())
        for name in names:
            tensor = weights.get_tensor(name)
            assert tensor.dtype == torch.bfloat16
            assert bool(tensor.isfinite().all()), name
            parameters += tensor.numel()
    assert "lm_head.weight" not in names
    assert parameters == 5_770_496


def test_heldout_modules_are_not_in_the_calibration_text() -> None:
    heldout_marks, calibration_marks = fingerprints(heldout()), fingerprints(calibration())
    assert len(heldout_marks) > 300
    assert len(calibration_marks) > 1500
    assert not heldout_marks & calibration_marks


def test_text_sizes_and_mixture() -> None:
    assert 100_000 <= HELDOUT_TEXT.stat().st_size <= 200_000
    assert 1_000_000 <= CALIBRATION_TEXT.stat().st_size <= 1_300_000
    assert calibration().count("\ndef ") + calibration().count("    def ") > 1000
    manual_headings = [line for line in calibration().splitlines() if len(line) > 5 and set(line) == {"*"}]
    assert len(manual_headings) >= 20


def test_corpus_of_this_python_keeps_heldout_modules_out() -> None:
    corpus = build_corpus()
    assert [document.name for document in corpus.heldout] == list(HELDOUT_MODULES)
    assert not {document.name for document in corpus.training} & set(HELDOUT_MODULES)
    heldout_marks = set().union(*(fingerprints(document.text) for document in corpus.heldout))
    for document in corpus.training:
        shared = heldout_marks & fingerprints(document.text)
        assert not shared, document.name
    assert build_corpus() == corpus


def test_corpus_of_an_incomplete_library_names_the_missing_file(tmp_path: Any) -> None:
    with pytest.raises(ResQError, match=r"bisect\.py is missing"):
        build_corpus(tmp_path)


def test_calibration_text_of_other_documents_takes_no_held_out_one() -> None:
    training = (Document("a.py", "library", "code of a\n"), Document("topic", "prose", "prose\n"))
    corpus = Corpus(training, (Document("bisect.py", "library", "held out\n"),))
    text = calibration_text(corpus)
    assert "code of a" in text
    assert "prose" in text
    assert "held out" not in text


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=200))
def test_tokenizer_round_trips_any_text(text: str) -> None:
    ids = tokenizer()(text, add_special_tokens=False)["input_ids"]
    assert all(0 <= token < 4096 for token in ids)
    if not any(special in text for special in tokenizer().all_special_tokens):
        assert tokenizer().decode(ids) == text


def test_tokenizer_puts_bos_first_and_compresses_code() -> None:
    ids = tokenizer()(heldout()[:20_000])["input_ids"]
    assert ids[0] == tokenizer().bos_token_id == 0
    assert tokenizer().eos_token_id == 1
    assert 20_000 / len(ids) > 3.0


def test_chat_template_asks_by_docstring() -> None:
    messages = [{"role": "user", "content": "Sort a list."}]
    text = tokenizer().apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == '<s>"""Sort a list."""\n'


@pytest.mark.parametrize(
    "prompt",
    [
        'import os\n\ndef read_file(path):\n    """Return the text of a file."""\n',
        'class Stack:\n    """A stack."""\n\n    def __init__(self):\n        self.items = []\n\n    def push(',
        '"""Parse dates."""\n\nimport re\n\n',
    ],
)
def test_sampled_completion_is_python_that_does_not_loop(prompt: str) -> None:
    torch.manual_seed(0)
    ids = tokenizer()(prompt, return_tensors="pt")["input_ids"]
    output = model().generate(ids, max_new_tokens=96, suppress_tokens=[tokenizer().eos_token_id])
    completion = str(tokenizer().decode(output[0, ids.shape[1] :], skip_special_tokens=True))
    words = completion.split()
    assert len(set(words)) >= len(words) * 0.3, completion
    assert sum(mark in completion for mark in ("self", "return", "import", "def ", "with ", "raise", "=", "):")) >= 3


@pytest.mark.parametrize(
    ("prompt", "continuation"),
    [
        ("if __name__ ==", " '__main__':"),
        ("        super().__init", "__("),
        ("        except KeyError", ":"),
        ("class Stack:\n    def __init__(self):\n        self", "."),
    ],
)
def test_most_likely_continuation_is_idiomatic(prompt: str, continuation: str) -> None:
    assert complete(prompt, tokens=8).startswith(continuation)


def test_heldout_windows_begin_with_bos_and_do_not_overlap() -> None:
    windows = heldout_windows(tokenizer(), heldout()[:30_000], window=128)
    assert windows.shape[1] == 128
    assert bool((windows[:, 0] == 0).all())
    ids = tokenizer()(heldout()[:30_000], add_special_tokens=False)["input_ids"]
    assert windows[:, 1:].flatten().tolist() == ids[: windows.shape[0] * 127]


def test_heldout_perplexity_is_the_documented_one() -> None:
    perplexity = heldout_perplexity(model(), heldout_windows(tokenizer(), heldout()))
    assert HELDOUT_PERPLEXITY / TOLERANCE < perplexity < HELDOUT_PERPLEXITY * TOLERANCE


def test_training_log_ends_with_the_schedule_done() -> None:
    lines = (MODEL_DIR / "training_log.txt").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["tokens"] for record in records] == sorted({record["tokens"] for record in records})
    assert records[-1]["lr"] < 1e-5
    assert records[-1]["heldout_loss"] == min(record["heldout_loss"] for record in records if "heldout_loss" in record)


def test_readme_states_the_measured_perplexity() -> None:
    readme = (BUNDLED_DIR / "README.md").read_text(encoding="utf-8")
    assert f"{HELDOUT_PERPLEXITY:.2f}" in readme
    assert "PSF" in readme


@pytest.mark.parametrize("window", [stage.window for stage in STAGES])
def test_training_batches_are_bos_and_consecutive_tokens(window: int) -> None:
    batch = next(batches(torch.arange(10, 20_010), window, bos=0, seed=3))
    assert batch.shape == (BATCH_TOKENS // window, window + 1)
    assert bool((batch[:, 0] == 0).all())
    assert bool((batch[:, 1:].diff(dim=1) == 1).all())


def test_learning_rate_warms_up_then_falls_to_zero() -> None:
    start, middle = Progress(step=0), Progress(step=5000, tokens=50, seconds=1.0)
    assert learning_rate(start, 0.0, 1.0) == pytest.approx(1 / WARMUP_STEPS)
    assert learning_rate(middle, middle.fraction(100, 100.0), 1.0) == pytest.approx(0.5)
    assert learning_rate(middle, Progress(seconds=200.0).fraction(100, 100.0), 1.0) == pytest.approx(0.0)


def test_spreading_the_gains_keeps_the_function_and_its_gradients() -> None:
    torch.manual_seed(0)
    small = model_config()
    small.num_hidden_layers = 2
    network = LlamaForCausalLM(small)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.0)
    ids = torch.randint(4, 4096, (1, 32))

    def gradients() -> dict[str, torch.Tensor]:
        optimizer.zero_grad()
        network(ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}

    gradients()
    optimizer.step()
    name = "model.layers.1.mlp.up_proj.weight"
    parameter = network.get_parameter(name)
    before, old = network(ids).logits, (gradients()[name], optimizer.state[parameter]["exp_avg"].clone())
    spread_gains(network, optimizer)
    after, new = network(ids).logits, (gradients()[name], optimizer.state[parameter]["exp_avg"])
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)
    assert float(network.get_parameter("model.layers.1.post_attention_layernorm.weight").detach().std()) > 0.5
    # Gradient and moment were scaled by the same factors.
    difference = new[0] * old[1] - old[0] * new[1]
    assert float(difference.norm() / (new[0] * old[1]).norm()) < 1e-3
