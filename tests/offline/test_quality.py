"""What ResQ must be worth: its perplexity against bf16, naive rounding, and the same recipe without a high part."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from offline.bundled import MODEL_DIR
from offline.cli import app
from offline.compare.options import CompareOptions
from offline.evaluate import evaluate_perplexity
from offline.evaluate.run import evaluate_model
from offline.methods.engine import open_engine

# An optional folder ../shared beside the checkout: a pretrained Llama that was not made for this project, and texts.
SHARED = Path(__file__).resolve().parents[3] / "shared" / "models"
STORIES = SHARED / "stories3M-gqa"
CALIBRATION = ["--nsamples", "48", "--seqlen", "512", "--eval-windows", "0"]


def quantized(model: Path, folder: Path, *flags: str) -> Path:
    app(["quantize", str(model), "-o", str(folder), *flags], standalone_mode=False)
    return folder


@pytest.fixture(scope="module")
def perplexities(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Of the bundled model on its held-out text, by method."""
    folder = tmp_path_factory.mktemp("quality")
    checkpoints = {
        "bf16": MODEL_DIR,
        "resq": quantized(MODEL_DIR, folder / "resq", *CALIBRATION),
        "uniform": quantized(MODEL_DIR, folder / "uniform", *CALIBRATION, "--high-fraction", "0"),
    }
    found = {
        name: evaluate_perplexity(path, seqlen=512, limit=24, progress=False).value
        for name, path in checkpoints.items()
    }
    naive = evaluate_model(str(MODEL_DIR), seqlen=512, windows=24, naive_rtn=True)["perplexity"]
    assert isinstance(naive, float)
    options = CompareOptions(model=str(MODEL_DIR), nsamples=48, seqlen=512, windows=24)
    quarot = open_engine(str(MODEL_DIR), options).run("quarot", with_model=False).ppl
    return found | {"naive": naive, "quarot": quarot}


def gap(perplexities: dict[str, float], method: str) -> float:
    """Log perplexity above bf16."""
    return math.log(perplexities[method] / perplexities["bf16"])


def test_naive_rounding_ruins_the_bundled_model(perplexities: dict[str, float]) -> None:
    assert perplexities["naive"] >= 1.5 * perplexities["bf16"]


def test_gap_is_a_fraction_of_uniform_bits(perplexities: dict[str, float]) -> None:
    assert gap(perplexities, "resq") <= 0.65 * gap(perplexities, "uniform")


def test_gap_is_half_of_quarots_at_most(perplexities: dict[str, float]) -> None:
    """Measured: 0.38 of it."""
    assert gap(perplexities, "resq") <= 0.5 * gap(perplexities, "quarot")


def test_gap_is_a_quarter_of_naive_rounding_at_most(perplexities: dict[str, float]) -> None:
    assert gap(perplexities, "resq") <= 0.25 * gap(perplexities, "naive")


@pytest.mark.skipif(not STORIES.is_dir(), reason="needs the optional folder ../shared/models beside the checkout")
def test_pretrained_stories_model_keeps_its_perplexity(tmp_path: Path) -> None:
    """The protocol of that folder's README: bf16 5.56, naive rounding 29 to 39, QuaRot 9.1 to 9.3, the paper 7.45."""
    stories = [s.strip() for s in (SHARED / "text" / "tinystories.txt").read_text().split("<|endoftext|>")[1:-1]]
    for name, part in (("calibration", stories[300:500]), ("evaluation", stories[:118])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in part))
    flags = ["--dataset", str(tmp_path / "calibration.jsonl"), "--nsamples", "200", "--eval-windows", "0"]
    checkpoint = quantized(STORIES, tmp_path / "resq", *flags)
    result = evaluate_perplexity(checkpoint, str(tmp_path / "evaluation.jsonl"), progress=False)
    assert result.tokens == 23460
    assert 6.2 < result.value <= 7.10
    options = CompareOptions(
        model=str(STORIES),
        dataset=str(tmp_path / "evaluation.jsonl"),
        calibration=str(tmp_path / "calibration.jsonl"),
        nsamples=200,
    )
    engine = open_engine(str(STORIES), options)
    found = {"resq": result.value} | {name: engine.run(name, with_model=False).ppl for name in ("bf16", "quarot")}
    assert gap(found, "resq") <= 0.5 * gap(found, "quarot")
