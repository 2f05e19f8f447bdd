"""SmoothQuant's scale and QUIK's channels, against their papers' formulas."""

from __future__ import annotations

import pytest
import torch

from offline.methods.lab import Lab
from offline.methods.plain import Quik, SmoothQuant, smoothing_scale
from offline.methods.plans import chosen_plan
from offline.quantize.linear_weights import PartWeights
from offline.quantize.rounding import round_asymmetric
from resq_vllm.formats.plan import HIGH, LOW
from tests.offline.methods.conftest import MakeLab


def test_smoothing_scale_worked_by_hand() -> None:
    # Channel 0: 16^½ / 4^½ = 2; channel 1: 1 / 9^½ = 1/3; channels without activations or weights keep 1.
    largest = torch.tensor([16.0, 1.0, 0.0, 2.0])
    weights = [torch.tensor([[4.0, -1.0, 3.0, 0.0]]), torch.tensor([[1.0, 9.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])]
    assert smoothing_scale(largest, weights, 0.5).tolist() == pytest.approx([2.0, 1 / 3, 1.0, 1.0])


def test_smoothing_moves_magnitude_from_activations_to_weights(make_lab: MakeLab) -> None:
    lab = make_lab()
    tensors = SmoothQuant().prepare(lab).layer(0).tensors
    own = lab.source.layer_tensors(0)
    norm, readers = lab.adapter.norm(0, "post"), [lab.adapter.linear(0, n) + ".weight" for n in ("gate", "up")]
    largest = lab.channels[0].inputs["gate_up"].largest
    expected = largest.sqrt() / torch.cat([own[key] for key in readers]).abs().amax(0).sqrt()
    torch.testing.assert_close(own[norm] / tensors[norm], expected)
    for key in readers:
        torch.testing.assert_close(tensors[key] / own[key], expected.expand(len(own[key]), -1))


def test_chosen_columns_stay_in_place() -> None:
    plan = chosen_plan(8, torch.tensor([6, 1, 2]), (4, 8))
    assert plan.part_index(HIGH) == [1, 2, 6]
    assert plan.part_index(LOW) == [0, 3, 4, 5, 7]
    assert [s.columns for s in plan.segments] == [1, 2, 3, 1, 1]


def test_quik_keeps_the_channels_of_largest_magnitude(make_lab: MakeLab) -> None:
    lab: Lab = make_lab()
    plan = Quik().prepare(lab).layer(1)
    for site, columns in (("qkv", 48), ("o", 64), ("gate_up", 48), ("down", 96)):
        weights = plan.sites[site].weights  # type: ignore[index]
        assert isinstance(weights, PartWeights)
        largest = lab.channels[1].inputs[site].largest  # type: ignore[index]
        expected = sorted(largest.argsort(descending=True)[: columns // 8].tolist())
        assert weights.plan.part_index(HIGH) == expected
    keys = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    high = lab.channels[1].key.largest.topk(2).indices.sort().values
    assert torch.equal(plan.kv.key(keys)[:, high], round_asymmetric(keys[:, high], 8))
