"""Compensated weights: the least-squares solution, against numpy's, and what calibration does not determine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from offline.models.adapter import SITE_LINEARS
from offline.models.layer import LoadedLayer
from offline.models.runner import LayerRunner
from offline.models.source import ModelSource
from offline.quantize.compensate import LayerInputs, SiteInputs
from resq_vllm.errors import ResQError
from resq_vllm.formats.metadata import SiteName
from tests.offline.models.tiny import save_tiny


def moments(x: torch.Tensor, x_hat: torch.Tensor) -> SiteInputs:
    n = len(x)
    return SiteInputs((2 / n * x_hat.T @ x_hat).float(), (2 / n * x.T @ x_hat).float())


def test_compensated_weight_is_the_least_squares_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 12, generator=generator)
    x_hat = x + 0.3 * torch.randn(400, 12, generator=generator) + 0.2 * x.roll(1, dims=1)
    weight = torch.randn(5, 12, generator=generator)
    compensated = weight.clone()
    moments(x, x_hat).compensate([compensated], damping=0.0)
    expected = np.linalg.lstsq(x_hat.numpy(), (x @ weight.T).numpy(), rcond=None)[0].T
    np.testing.assert_allclose(compensated.numpy(), expected, rtol=1e-3, atol=1e-4)
    # It is better than the weight itself, which is the point.
    better, plain = ((x @ weight.T - x_hat @ w.T).square().sum() for w in (compensated, weight))
    assert better < 0.9 * plain


def test_equal_inputs_leave_the_weight() -> None:
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    weight = torch.eye(8)
    moments(x, x).compensate([weight])
    torch.testing.assert_close(weight, torch.eye(8), rtol=0, atol=1e-5)


def test_direction_that_calibration_never_reached_stays() -> None:
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    x[:, 3] = 0
    x_hat = 0.9 * x
    target = torch.eye(8)
    moments(x, x_hat).compensate([target], damping=0.01)
    assert target[3].tolist() == pytest.approx([0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0], abs=1e-6)
    assert float(target[0, 0]) == pytest.approx(1 / 0.9, abs=0.02)


def test_nothing_to_compensate() -> None:
    weight = torch.ones(2, 3)
    SiteInputs(torch.eye(3)).compensate([weight])
    assert weight.eq(1).all()


def test_inputs_of_zeros_leave_the_weight() -> None:
    weight = torch.ones(2, 3)
    SiteInputs(torch.zeros(3, 3), torch.zeros(3, 3)).compensate([weight])
    assert weight.eq(1).all()


def test_hessian_comes_through_as_it_was() -> None:
    x = torch.randn(900, 700, generator=torch.Generator().manual_seed(0))
    before = (x.T @ x + (x.T @ x).T) / 900
    hessian = before.clone()
    SiteInputs(hessian, before).compensate([torch.ones(2, 700)])
    assert torch.equal(hessian, before)


def test_inputs_that_are_not_finite() -> None:
    with pytest.raises(ResQError, match="NaN or infinite"):
        SiteInputs(torch.eye(2), torch.tensor([[torch.nan, 0.0], [0.0, 1.0]])).compensate([torch.eye(2)])


def streamed(folder: Path, site: SiteName) -> tuple[SiteInputs, torch.Tensor, list[torch.Tensor], LoadedLayer]:
    """Moments of a layer that halves the site's inputs; those inputs before; the float states behind; the layer."""
    save_tiny("llama", folder)
    runner = LayerRunner(ModelSource.open(str(folder)))
    generator = torch.Generator().manual_seed(0)
    hiddens = [torch.randn(2, 9, 48, generator=generator), torch.randn(1, 5, 48, generator=generator)]
    layer, reference, states = runner.layer(0), runner.layer(0), list(hiddens)
    layer.transforms[site] = lambda x: 0.5 * x
    inputs = LayerInputs(layer, hiddens, reference, states)
    found = inputs.site(site, layer.weight(SITE_LINEARS[site][0]).shape[1])
    inputs.finish()
    rows: list[torch.Tensor] = []
    reference.stream_inputs(hiddens, site, rows.append)
    for state, hidden in zip(states, hiddens, strict=True):
        torch.testing.assert_close(state, reference.forward(hidden), rtol=0, atol=0)
    x = torch.cat(rows)
    assert len(x) == 23
    torch.testing.assert_close(found.hessian, 0.25 * 2 / 23 * x.T @ x, rtol=1e-4, atol=1e-4)
    return found, x, states, layer


def test_both_models_are_streamed_batch_by_batch(tmp_path: Path) -> None:
    found, x, _, _ = streamed(tmp_path, "gate_up")
    assert found.outputs is None
    assert found.cross is not None
    torch.testing.assert_close(found.cross, 0.5 * 2 / 23 * x.T @ x, rtol=1e-4, atol=1e-4)


def test_linear_with_fewer_outputs_than_inputs_needs_only_their_moments(tmp_path: Path) -> None:
    found, x, _, layer = streamed(tmp_path, "down")
    weight = layer.weight("down")
    assert found.cross is None
    assert found.outputs is not None
    torch.testing.assert_close(found.outputs, 0.5 * 2 / 23 * (x @ weight.T).T @ x, rtol=1e-4, atol=1e-4)
    # Both forms ask for the same weight.
    other, ours = weight.clone(), weight.clone()
    SiteInputs(found.hessian, cross=0.5 * 2 / 23 * x.T @ x).compensate([other])
    found.compensate([ours])
    torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-5)
