"""Streaming accumulation of H = 2/n · XᵀX."""

from __future__ import annotations

import pytest
import torch

from offline.quantize.hessian import HessianAccumulator, weighted_error
from offline.quantize.triangular import BLOCK
from resq_vllm.errors import ResQError


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stream_equals_one_product(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(50, 12)
    accumulator = HessianAccumulator(12, dtype)
    for chunk in inputs.split([7, 1, 42]):
        accumulator.add(chunk.reshape(1, -1, 12).to(torch.float32))
    assert accumulator.tokens == 50
    torch.testing.assert_close(accumulator.hessian(), 2 / 50 * inputs.T @ inputs)


def test_inputs_of_another_width_are_refused() -> None:
    with pytest.raises(ResQError, match="have 5 columns where the layer has 4"):
        HessianAccumulator(4).add(torch.ones(2, 5))


def test_hessian_without_tokens_is_refused() -> None:
    with pytest.raises(ResQError, match="longer calibration text"):
        HessianAccumulator(4).hessian()


def test_weighted_error_is_the_output_error() -> None:
    torch.manual_seed(1)
    inputs, weight = torch.randn(30, 6), torch.randn(4, 6)
    rounded = weight.round()
    expected = 2 / 30 * ((inputs @ (rounded - weight).T) ** 2).sum()
    assert weighted_error(weight, rounded, 2 / 30 * inputs.T @ inputs) == pytest.approx(float(expected), rel=1e-5)


def test_more_columns_than_a_panel_are_symmetric_to_the_bit() -> None:
    rows = torch.randn(50, 2 * BLOCK + 9, generator=torch.Generator().manual_seed(0))
    accumulator = HessianAccumulator(2 * BLOCK + 9)
    for part in rows.split(20):
        accumulator.add(part)
    found = accumulator.hessian()
    assert torch.equal(found, found.T)
    torch.testing.assert_close(found, (2 / 50 * rows.double().T @ rows.double()).float(), rtol=1e-4, atol=1e-5)
    # The sum became the result.
    with pytest.raises(ResQError, match="no calibration token"):
        accumulator.hessian()
