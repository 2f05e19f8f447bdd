"""Quantized linear layers: column order, shared factors, bad input."""

from __future__ import annotations

import pytest
import torch

from offline.quantize.gptq import factorise
from offline.quantize.mixed import quantize_linear, quantize_parts
from resq_vllm.errors import ResQError
from resq_vllm.formats.metadata import LinearSite
from resq_vllm.formats.plan import HIGH, LOW, LinearPlan, Segment, linear_plan
from resq_vllm.reference import fake_quantize_activation, linear

HEADS = linear_plan(LinearSite(low=28, high=4, order="heads", scales="part"), 32, 16)
HALVES = linear_plan(LinearSite(low=28, high=4), 32, 16)
DOWN = linear_plan(LinearSite(low=32, high=0, scales="block", hadamard_groups=4), 32, 16)


@pytest.mark.parametrize("plan", [HEADS, HALVES, DOWN], ids=["heads", "contiguous", "hadamard"])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_dequantized_weight_is_in_x_column_order(plan: LinearPlan, method: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(24, 32)
    hessian = torch.eye(32) if method == "gptq" else None
    quantized = quantize_linear(weight, hessian, plan)
    assert (quantized.low.shape, quantized.high.shape) == ((24, plan.part_columns[0]), (24, plan.part_columns[1]))
    restored = quantized.dequantize()
    torch.testing.assert_close(restored, weight, atol=0.35, rtol=0)
    high = plan.part_index(HIGH)
    torch.testing.assert_close(restored[:, high], weight[:, high], atol=0.02, rtol=0)


@pytest.mark.parametrize("plan", [HEADS, HALVES, DOWN], ids=["heads", "contiguous", "hadamard"])
def test_codes_serve_as_the_reference_expects(plan: LinearPlan) -> None:
    torch.manual_seed(0)
    x, q = torch.randn(5, 32), quantize_linear(torch.randn(24, 32), None, plan)
    served = linear(x, q.low, q.high, q.low_scale, q.high_scale, plan)
    torch.testing.assert_close(served, fake_quantize_activation(x, plan) @ q.dequantize().T, rtol=1e-4, atol=1e-4)


def test_shared_factor_gives_the_same_codes() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(64, 32) @ torch.randn(32, 32)
    hessian = inputs.T @ inputs
    factor = factorise(hessian, HEADS)
    for _ in range(3):
        weight = torch.randn(8, 32)
        alone, shared = quantize_linear(weight, hessian, HEADS), quantize_linear(weight, factor, HEADS)
        assert torch.equal(alone.low, shared.low)
        assert torch.equal(alone.high, shared.high)


@pytest.mark.parametrize("plan", [HEADS, HALVES, DOWN], ids=["heads", "contiguous", "hadamard"])
def test_nearest_on_the_same_scales_is_rounding_to_nearest(plan: LinearPlan) -> None:
    torch.manual_seed(0)
    inputs, weight = torch.randn(64, 32) @ torch.randn(32, 32), torch.randn(24, 32)
    swept = quantize_linear(weight, inputs.T @ inputs, plan)
    assert not torch.equal(swept.low, swept.nearest(weight).low)
    torch.testing.assert_close(swept.nearest(weight).dequantize(), quantize_linear(weight, None, plan).dequantize())


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_three_parts_have_their_own_bits_and_order(method: str) -> None:
    torch.manual_seed(0)
    plan = LinearPlan((Segment(8, 2, 2), Segment(16, 0, 0), Segment(8, 1, 1)), (2, 4, 8))
    weight, hessian = torch.randn(24, 32), torch.eye(32) if method == "gptq" else None
    codes, grid = quantize_parts(weight, hessian, plan, (2, 4, 8))
    assert grid.row.tolist() == [0] * 16 + [1] * 8 + [2] * 8
    for columns, bits in ((slice(0, 16), 2), (slice(16, 24), 4), (slice(24, 32), 8)):
        assert int(codes[:, columns].min()) >= -(2 ** (bits - 1))
        assert int(codes[:, columns].max()) < 2 ** (bits - 1)
    restored = grid.values(codes)
    torch.testing.assert_close(restored[:, 24:], weight[:, :8], atol=0.02, rtol=0)
    torch.testing.assert_close(restored[:, 16:24], weight[:, 24:], atol=0.35, rtol=0)


def test_absent_part_has_no_columns_and_scale_zero() -> None:
    quantized = quantize_linear(torch.randn(6, 32), None, DOWN)
    assert quantized.high.shape == (6, 0)
    assert quantized.high_scale.tolist() == [0.0] * 6
    assert bool((quantized.low_scale > 0).all())


def test_uniform_8_bits() -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 32)
    quantized = quantize_linear(weight, None, HALVES, low_bits=8)
    assert int(quantized.low.abs().max()) > 7
    torch.testing.assert_close(quantized.dequantize(), weight, atol=0.02, rtol=0)
    assert HALVES.part_index(LOW) == list(range(28))


def test_bfloat16_weight_is_accepted() -> None:
    assert quantize_linear(torch.randn(6, 32).bfloat16(), None, HALVES).low_scale.dtype == torch.float32


def test_weight_of_another_width_names_the_layer() -> None:
    with pytest.raises(ResQError, match=r"^q_proj: the weight has 30 input columns where the plan has 32"):
        quantize_linear(torch.ones(4, 30), None, HALVES, name="q_proj")


def test_weight_with_nan_names_the_layer() -> None:
    weight = torch.ones(4, 32)
    weight[1, 2] = torch.nan
    with pytest.raises(ResQError, match=r"^q_proj: the weight holds NaN"):
        quantize_linear(weight, None, HALVES, name="q_proj")
