"""Errors of one layer: un-rotating is exact, and every figure follows its formula."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from offline.bases.bases import LayerRotation
from offline.models.layer import Observed, Observer
from offline.models.runner import LayerRunner
from offline.models.source import ModelSource
from offline.quantize.mixed import QuantizedLinear, quantize_linear
from offline.report.measure import (
    ErrorSum,
    LayerMeasurement,
    SiteMeasurement,
    kv_errors,
    largest_last,
    leading_tokens,
    relative_error,
    undo_hadamard,
)
from offline.rotate.fuse import fuse_layer, rotate_rows
from resq_vllm.formats.kv_layout import KVLayout
from resq_vllm.formats.metadata import SITES, LinearSite, SiteName
from resq_vllm.formats.plan import linear_plan
from resq_vllm.reference import block_hadamard, round_activation
from tests.offline.models.tiny import FAMILIES, save_tiny
from tests.offline.pack.tiny_checkpoint import METADATA

PLANS = {site: linear_plan(spec, spec.low + spec.high, 16) for site, spec in METADATA.sites.items()}


def orthogonal(*shape: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(*shape, dtype=torch.float64))[0]


def random_rotation() -> LayerRotation:
    torch.manual_seed(3)
    return LayerRotation(orthogonal(48, 48), orthogonal(2, 16, 16), orthogonal(16, 16))


def test_leading_tokens_takes_whole_sequences_and_cuts_the_last() -> None:
    batches = [torch.arange(20).view(2, 10), torch.arange(100, 130).view(3, 10)]
    assert [tuple(t.shape) for t in leading_tokens(batches, 35)] == [(2, 10), (1, 10)]
    assert [tuple(t.shape) for t in leading_tokens(batches, 25)] == [(2, 10), (1, 5)]
    assert sum(t.numel() for t in leading_tokens(batches, 1000)) == 50
    assert [tuple(t.shape) for t in leading_tokens([torch.zeros(4, 64, 3)], 10)] == [(1, 10, 3)]


def test_relative_error_by_hand() -> None:
    assert relative_error(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0])) == 0.5
    total = ErrorSum()
    total.add(torch.tensor([3.0]), torch.tensor([4.0]))
    total.add(torch.tensor([0.0, 0.0]), torch.tensor([0.0, 2.0]))
    assert total.relative == 0.25


def test_all_zeros_have_no_error() -> None:
    assert relative_error(torch.zeros(3), torch.zeros(3)) == 0.0


@pytest.mark.parametrize(("width", "groups"), [(96, 8), (96, 1), (64, 4), (40, 2), (7, 0)])
def test_hadamard_is_undone(width: int, groups: int) -> None:
    x = torch.randn(5, width, dtype=torch.float64)
    torch.testing.assert_close(undo_hadamard(rotate_rows(x, groups), groups), x)


def test_high_places_go_to_the_largest_channels_of_each_head() -> None:
    site = LinearSite(low=6, high=2, scales="head", order="heads")
    moment = torch.tensor([9.0, 1.0, 2.0, 3.0, 5.0, 8.0, 7.0, 6.0])
    order = largest_last(linear_plan(site, 8, 4), moment).tolist()
    assert (order[3], order[7]) == (0, 5)
    assert sorted(order) == list(range(8))
    assert set(order[:4]) == {0, 1, 2, 3}


def test_columns_stay_in_place_without_a_high_part() -> None:
    site = LinearSite(low=8, high=0, scales="block", hadamard_groups=2)
    assert largest_last(linear_plan(site, 8, 4), torch.rand(8)).tolist() == list(range(8))


@pytest.mark.parametrize("family", FAMILIES)
def test_unrotated_inputs_are_those_of_the_model(family: str, tmp_path: Path) -> None:
    save_tiny(family, tmp_path)
    source = ModelSource.open(tmp_path)
    runner, rotation = LayerRunner(source), random_rotation()
    original = source.layer_tensors(1)
    hidden = torch.randn(2, 20, 48)
    rotated = [hidden @ rotation.residual.float()]
    measurement = LayerMeasurement(source.adapter, METADATA, PLANS, 1, original, rotation)
    layer = runner.layer(1, fuse_layer(original, source.adapter, 1, rotation, 8))
    layer.transforms["down"] = lambda x: block_hadamard(x, 8)

    def observe(into: dict[Observed, torch.Tensor]) -> dict[Observed, Observer]:
        def keep(site: SiteName) -> Observer:
            return lambda x: into.update({site: x.flatten(0, 1)})

        return {site: keep(site) for site in SITES}

    seen: dict[Observed, torch.Tensor] = {}
    plain: dict[Observed, torch.Tensor] = {}
    layer.forward(rotated[0], observe(seen))
    runner.layer(1).forward(hidden, observe(plain))
    for site in SITES:
        torch.testing.assert_close(measurement.own_input(site, seen[site]), plain[site], rtol=1e-3, atol=2e-4)


def test_site_errors_follow_their_formula() -> None:
    torch.manual_seed(0)
    site = LinearSite(low=14, high=2)
    plan = linear_plan(site, 16, 8)
    rotation = orthogonal(16, 16).float()
    own = torch.randn(30, 16)
    own[:, 14:] *= torch.tensor([5.0, 9.0])
    weights = [torch.randn(5, 16), torch.randn(3, 16)]
    x, x_hat = own @ rotation, round_activation(own @ rotation, plan)
    measured = SiteMeasurement(x, own, site, plan)
    for weight in weights:
        hessian = 2 / 30 * x.T @ x
        measured.add(weight, weight @ rotation, quantize_linear(weight @ rotation, hessian, plan), nearest=False)
    found = measured.errors()

    def ratio(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
        return float(sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs))

    fused = [weight @ rotation for weight in weights]
    kept = [quantize_linear(w, 2 / 30 * x.T @ x, plan).dequantize() for w in fused]
    nearest = [quantize_linear(w, None, plan).dequantize() for w in fused]
    # The largest channels stand last already, and the order inside a part does not matter.
    own_hat = round_activation(own, plan)
    before = [quantize_linear(w, None, plan).dequantize() for w in weights]
    assert found.activation.after == pytest.approx(ratio([(x_hat, x)]), rel=1e-3)
    assert found.activation.before == pytest.approx(ratio([(own_hat, own)]), rel=1e-3)
    assert found.weight.before == pytest.approx(ratio(list(zip(before, weights, strict=True))), rel=1e-3)
    assert found.weight.rotated == pytest.approx(ratio(list(zip(nearest, fused, strict=True))), rel=1e-3)
    assert found.weight.after == pytest.approx(ratio(list(zip(kept, fused, strict=True))), rel=1e-3)
    outputs = [(x_hat @ k.T, x @ w.T) for k, w in zip(kept, fused, strict=True)]
    assert found.output.after == pytest.approx(ratio(outputs), rel=1e-3)
    outputs = [(own_hat @ b.T, own @ w.T) for b, w in zip(before, weights, strict=True)]
    assert found.output.before == pytest.approx(ratio(outputs), rel=1e-3)


def test_without_a_rotation_nothing_changes() -> None:
    torch.manual_seed(1)
    site = LinearSite(low=16, high=0)
    plan = linear_plan(site, 16, 8)
    x, weight = torch.randn(9, 16), torch.randn(4, 16)
    measured = SiteMeasurement(x, x, site, plan)
    stored: QuantizedLinear = quantize_linear(weight, None, plan)
    measured.add(weight, weight, stored, nearest=True)
    found = measured.errors()
    assert found.activation.before == found.activation.after > 0
    assert found.output.before == found.output.rotated == found.output.after > 0


def test_kv_errors_see_outliers_that_the_rotation_spreads() -> None:
    torch.manual_seed(2)
    rotation = random_rotation()
    layout = KVLayout(16, 0, 4)
    own = torch.randn(2, 200, 16)
    own[:, :, 3] *= 30
    key, value = kv_errors(own, own @ rotation.value.float(), layout, rotation)
    assert key.after < key.before
    assert value.after < value.before


def test_kv_errors_give_the_high_dims_to_the_largest_channels() -> None:
    torch.manual_seed(2)
    eye = torch.eye(16, dtype=torch.float64)
    rotation = LayerRotation(torch.eye(48, dtype=torch.float64), eye.expand(2, 16, 16), eye)
    own = torch.randn(2, 200, 16)
    own[0, :, 3] *= 30
    own[1, :, 3] *= 30
    key, value = kv_errors(own, own, KVLayout(16, 2, 4), rotation)
    # "After" keeps the last two dims high, wherever the outlier is; "before" finds it.
    assert key.before < 0.1 * key.after
    assert value.before < 0.1 * value.after


def test_values_of_a_grid_have_no_kv_error() -> None:
    eye = torch.eye(16, dtype=torch.float64)
    rotation = LayerRotation(torch.eye(48, dtype=torch.float64), eye.expand(1, 16, 16), eye)
    grid = torch.arange(16.0).expand(1, 4, 16)
    key, value = kv_errors(grid, grid, KVLayout(16, 0, 4), rotation)
    assert (key.before, key.after, value.before, value.after) == (0, 0, 0, 0)
