"""The naive baseline: what it quantizes, and its published-protocol figures on a small pretrained model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from offline.evaluate.dataset import load_dataset
from offline.evaluate.fake_quant import FakeQuantLinear
from offline.evaluate.naive import load_naive_model
from offline.evaluate.perplexity import model_perplexity
from offline.evaluate.reference_model import load_reference_model
from offline.evaluate.sequences import Sequences, model_sequences
from tests.offline.models.tiny import random_sequences, save_tiny

# An optional folder ../shared beside the checkout holds a small pretrained Llama and stories.
SHARED = Path(__file__).resolve().parents[3] / "../shared/models"
STORIES_MODEL = SHARED / "stories3M-gqa"
needs_shared = pytest.mark.skipif(not STORIES_MODEL.is_dir(), reason="needs the optional folder ../shared")


@pytest.mark.parametrize("family", ["llama", "qwen2-window"])
def test_all_decoder_linears_and_the_cache_are_quantized(family: str, tmp_path: Path) -> None:
    plain = save_tiny(family, tmp_path)
    ids = random_sequences([20])[0]
    naive = load_naive_model(tmp_path)
    linears = [m for m in naive.modules() if isinstance(m, FakeQuantLinear)]
    assert len(linears) == 3 * 7
    assert {m.plan.group_bits for m in linears} == {(4,)}
    assert isinstance(naive.lm_head, torch.nn.Linear)
    with torch.no_grad():
        exact = plain(input_ids=ids).logits
        four, eight = naive(input_ids=ids).logits, load_naive_model(tmp_path, 8)(input_ids=ids).logits
    errors = [float((logits - exact).norm() / exact.norm()) for logits in (four, eight)]
    assert 0 < errors[1] < 0.2 * errors[0]


def test_folding_the_norms_keeps_the_float_function(tmp_path: Path) -> None:
    """At 8 bits both forms stay close to the model; a wrong fold would not."""
    plain, ids = save_tiny("qwen2", tmp_path), random_sequences([20])[0]
    folded = load_naive_model(tmp_path, 8, fold_norms=True)
    assert all(bool((layer.input_layernorm.weight == 1).all()) for layer in folded.model.layers)
    with torch.no_grad():
        exact, found = plain(input_ids=ids).logits, folded(input_ids=ids).logits
    assert float((found - exact).norm() / exact.norm()) < 0.2


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Sequences:
    """The first 12 of the protocol's 118 stories, one a sequence: 2323 predicted tokens."""
    pieces = (SHARED / "text/tinystories.txt").read_text(encoding="utf-8").split("<|endoftext|>")[1:-1]
    path = tmp_path_factory.mktemp("stories") / "stories.jsonl"
    path.write_text("".join(json.dumps({"text": piece.strip()}) + "\n" for piece in pieces[:12]), encoding="utf-8")
    return model_sequences(STORIES_MODEL, load_dataset(str(path)))


@needs_shared
def test_float_model_on_stories(stories: Sequences) -> None:
    """5.5646 on all 118 stories (published: 5.565); 7.3404 on the first 12."""
    assert stories.predicted_tokens == 2323
    assert model_perplexity(load_reference_model(STORIES_MODEL), stories, progress=False).value == pytest.approx(
        7.3404, abs=2e-3
    )


@needs_shared
@pytest.mark.parametrize(("clip", "expected"), [(True, 41.02), (False, 53.05)])
def test_naive_4_bit_on_stories(clip: bool, expected: float, stories: Sequences) -> None:
    """With norms folded, 29.3 with clip search and 39.4 without on all 118 stories (published: 29.0 and 38.9)."""
    model = load_naive_model(STORIES_MODEL, clip=clip, fold_norms=True)
    assert model_perplexity(model, stories, progress=False).value == pytest.approx(expected, rel=0.03)
