"""Compensated weights: the least-squares solution, against numpy's, and what calibration does not determine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from offline.models.runner import LayerRunner
from offline.models.source import ModelSource
from offline.quantize.compensate import LayerInputs, SiteInputs
from resq_vllm.errors import ResQError
from tests.offline.models.tiny import save_tiny


def moments(x: torch.Tensor, x_hat: torch.Tensor) -> SiteInputs:
    n = len(x)
    return SiteInputs((2 / n * x_hat.T @ x_hat).float(), (2 / n * x.T @ x_hat).float())


def test_compensated_weight_is_the_least_squares_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 12, generator=generator)
    x_hat = x + 0.3 * torch.randn(400, 12, generator=generator) + 0.2 * x.roll(1, dims=1)
    weight = torch.randn(5, 12, generator=generator)
    compensation = moments(x, x_hat).compensation(damping=0.0)
    assert compensation is not None
    expected = np.linalg.lstsq(x_hat.numpy(), (x @ weight.T).numpy(), rcond=None)[0].T
    np.testing.assert_allclose(compensation(weight).numpy(), expected, rtol=1e-3, atol=1e-4)
    # It is better than the weight itself, which is the point.
    better, plain = ((x @ weight.T - x_hat @ w.T).square().sum() for w in (compensation(weight), weight))
    assert better < 0.9 * plain


def test_equal_inputs_leave_the_weight() -> None:
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    compensation = moments(x, x).compensation()
    assert compensation is not None
    torch.testing.assert_close(compensation(torch.eye(8)), torch.eye(8), rtol=0, atol=1e-5)


def test_direction_that_calibration_never_reached_stays() -> None:
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    x[:, 3] = 0
    x_hat = 0.9 * x
    compensation = moments(x, x_hat).compensation(damping=0.01)
    assert compensation is not None
    target = compensation(torch.eye(8))
    assert target[3].tolist() == pytest.approx([0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0], abs=1e-6)
    assert float(target[0, 0]) == pytest.approx(1 / 0.9, abs=0.02)


def test_nothing_to_compensate() -> None:
    assert SiteInputs(torch.eye(3)).compensation() is None


def test_inputs_that_are_not_finite() -> None:
    with pytest.raises(ResQError, match="NaN or infinite"):
        SiteInputs(torch.eye(2), torch.tensor([[torch.nan, 0.0], [0.0, 1.0]])).compensation()


def test_both_models_are_streamed_batch_by_batch(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    runner = LayerRunner(ModelSource.open(str(tmp_path)))
    generator = torch.Generator().manual_seed(0)
    hiddens = [torch.randn(2, 9, 48, generator=generator), torch.randn(1, 5, 48, generator=generator)]
    layer, reference = runner.layer(0), runner.layer(0)
    layer.transforms["down"] = lambda x: 0.5 * x
    found = LayerInputs(layer, hiddens, reference, hiddens).site("down", 96)
    rows: list[torch.Tensor] = []
    reference.stream_inputs(hiddens, "down", rows.append)
    x = torch.cat(rows)
    assert len(x) == 23
    torch.testing.assert_close(found.hessian, 0.25 * 2 / 23 * x.T @ x, rtol=1e-4, atol=1e-4)
    assert found.cross is not None
    torch.testing.assert_close(found.cross, 0.5 * 2 / 23 * x.T @ x, rtol=1e-4, atol=1e-4)
