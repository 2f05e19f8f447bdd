"""ResQ on the bench: the checkpoint of ``resq quantize`` measured without writing it, and the three-way split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from offline.cli import app
from offline.compare.options import CompareOptions
from offline.evaluate import evaluate_perplexity
from offline.evaluate.dataset import load_dataset
from offline.evaluate.perplexity import model_perplexity
from offline.evaluate.sequences import model_sequences
from offline.methods.engine import open_engine
from offline.methods.lab import Lab
from offline.methods.resq import ResQ, ResQPrepared, three_way
from offline.quantize.linear_weights import PartWeights
from resq_vllm.formats.plan import LinearPlan, Segment
from tests.offline.methods.conftest import MakeLab
from tests.offline.pipeline.conftest import tiny_llama


def test_three_way_split_worked_by_hand() -> None:
    # Two heads of [14 | 2]: an eighth of 16 dims is 2, taken from the front of each head's low segment.
    plan = LinearPlan((Segment(14, 0, 0), Segment(2, 1, 1), Segment(14, 0, 0), Segment(2, 1, 1)), (4, 8))
    split = three_way(plan, 1 / 8)
    head = (Segment(2, 0, 2), Segment(12, 1, 0), Segment(2, 2, 1))
    assert split.segments == head * 2
    assert split.group_bits == (4, 8, 2)
    assert split.part_index(0) == [0, 1, 16, 17]


def test_three_way_rounds_the_first_columns_to_four_values(make_lab: MakeLab) -> None:
    lab: Lab = make_lab()
    prepared = ResQ(lowest_fraction=1 / 8).prepare(lab)
    assert isinstance(prepared, ResQPrepared)
    site = prepared.sites["qkv"]
    rounded = site.activation(torch.randn(50, 48, generator=torch.Generator().manual_seed(0)))
    for row in rounded:
        assert len(set(row[:6].tolist())) <= 4
        assert len(set(row[6:42].tolist())) <= 16
    assert isinstance(site.weights, PartWeights)
    assert site.weights.part_bits == (2, 4, 8)
    assert prepared.kv_bits(0) == (2 * 2 + 12 * 4 + 2 * 8) / 16


@pytest.mark.parametrize(
    "extra",
    [
        (),
        ("--no-compensate",),
        ("--o-scales", "kv", "--kv-bits", "8"),
        ("--lm-head-bits", "8"),
        ("--lm-head-bits", "4"),
        ("--lm-head-bits", "4", "--rtn"),
    ],
)
def test_row_is_the_checkpoint(extra: tuple[str, ...], tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model")
    app(
        [
            "quantize",
            str(model),
            "-o",
            str(tmp_path / "out"),
            "--nsamples",
            "8",
            "--seqlen",
            "64",
            "--eval-windows",
            "0",
            *extra,
        ],
        standalone_mode=False,
    )
    served = evaluate_perplexity(tmp_path / "out", seqlen=64, limit=8, progress=False).value
    options = CompareOptions(model=str(model), nsamples=8, seqlen=64, windows=8)
    engine = open_engine(str(model), options)
    changes: dict[tuple[str, ...], dict[str, Any]] = {
        (): {},
        ("--no-compensate",): {"compensate": False},
        ("--lm-head-bits", "8"): {"lm_head_bits": 8},
        ("--lm-head-bits", "4"): {"lm_head_bits": 4},
        ("--lm-head-bits", "4", "--rtn"): {"lm_head_bits": 4, "rtn": True},
    }
    engine.add(ResQ(name="checkpoint", **changes.get(extra, {"o_scales": "kv", "kv_bits": (8,)})))
    measured = engine.run("checkpoint", with_model=True)
    assert measured.ppl == pytest.approx(served, rel=1e-3)
    sequences = model_sequences(tmp_path / "out", load_dataset("bundled"), 64, 8)
    assert model_perplexity(measured.model, sequences, False).value == pytest.approx(served, rel=1e-3)
    ids = torch.tensor([[0, 5, 9, 30, 2]])
    with torch.no_grad():
        assert measured.model(input_ids=ids).logits.shape == (1, 5, 4096)
