"""GPTQ with mixed precision: a case worked by hand, comparison with rounding, and Hessians that do not factorise."""

from __future__ import annotations

import logging

import pytest
import torch

from offline.quantize.gptq import HessianFactor, column_order, factorise, gptq
from offline.quantize.hessian import weighted_error
from offline.quantize.mixed import quantize_linear
from offline.quantize.weights import WeightGrid, symmetric_codes, symmetric_scale
from resq_vllm.errors import ResQError
from resq_vllm.formats.plan import HIGH, LOW, LinearPlan, Segment


def one_part(columns: int) -> LinearPlan:
    return LinearPlan((Segment(columns, LOW, 0),), (4,))


def two_parts(low: int, high: int) -> LinearPlan:
    return LinearPlan((Segment(low, LOW, 0), Segment(high, HIGH, 1)), (4, 8))


def correlated_hessian(columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(512, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return 2 / 512 * inputs.T @ inputs


def test_case_worked_by_hand() -> None:
    # scale = 1/7. Column 0: 0.4·7 = 2.8 -> 3, error 0.4 − 3/7 = −0.02857. H⁻¹ ∝ [[2, −1], [−1, 2]] on columns 0 and 1,
    # so U_01/U_00 = −1/2 and column 1 becomes 0.65 − 0.01429 = 0.63571: code 4.45 -> 4, where rounding alone gives 5.
    hessian = torch.tensor([[2.0, 1.0, 0.0], [1.0, 2.0, 0.0], [0.0, 0.0, 1.0]])
    weight = torch.tensor([[0.4, 0.65, 1.0]])
    factor = factorise(hessian, one_part(3), damping=0.0)
    grid = WeightGrid.of_parts(weight, [3], [4], clip=False)
    assert gptq(weight, factor, grid).tolist() == [[3, 4, 7]]
    assert grid.scale.item() == pytest.approx(1 / 7)
    assert quantize_linear(weight, None, one_part(3), clip=False).low.tolist() == [[3, 5, 7]]


def test_without_correlation_gptq_is_rounding() -> None:
    torch.manual_seed(0)
    weight, plan = torch.randn(8, 40), two_parts(34, 6)
    by_gptq = quantize_linear(weight, torch.diag(torch.rand(40) + 0.1), plan)
    by_rounding = quantize_linear(weight, None, plan)
    assert torch.equal(by_gptq.low, by_rounding.low)
    assert torch.equal(by_gptq.high, by_rounding.high)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("clip", [True, False])
def test_gptq_beats_rounding_on_correlated_inputs(seed: int, clip: bool) -> None:
    weight = torch.randn(64, 160, generator=torch.Generator().manual_seed(seed))
    hessian, plan = correlated_hessian(160, seed), two_parts(140, 20)
    errors = [
        weighted_error(weight, quantize_linear(weight, h, plan, clip=clip).dequantize(), hessian)
        for h in (hessian, None)
    ]
    assert errors[0] < 0.7 * errors[1]


def test_scales_are_those_of_the_original_weight() -> None:
    torch.manual_seed(0)
    weight = torch.randn(16, 48)
    result = quantize_linear(weight, correlated_hessian(48), two_parts(40, 8))
    assert torch.equal(result.low_scale, symmetric_scale(weight[:, :40], 4))
    assert torch.equal(result.high_scale, symmetric_scale(weight[:, 40:], 8))


def test_block_size_does_not_change_the_result() -> None:
    torch.manual_seed(0)
    weight = torch.randn(16, 50)
    factor = factorise(correlated_hessian(50), two_parts(44, 6))
    grid = WeightGrid.of_parts(weight, [44, 6], [4, 8])
    assert torch.equal(gptq(weight, factor, grid), gptq(weight, factor, grid, block=7))


def test_column_that_calibration_never_reached_is_rounded_to_nearest() -> None:
    torch.manual_seed(0)
    weight, hessian = torch.randn(8, 20), correlated_hessian(20)
    hessian[5, :] = 0
    hessian[:, 5] = 0
    result = quantize_linear(weight, hessian, one_part(20))
    expected = symmetric_codes(weight, symmetric_scale(weight, 4), 4)
    assert torch.equal(result.low[:, 5], expected[:, 5])
    assert not torch.equal(result.low, expected)


def test_fewer_tokens_than_columns_still_factorise() -> None:
    inputs = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    factor = factorise(2 / 5 * inputs.T @ inputs, one_part(32))
    assert bool(torch.isfinite(factor.upper).all())
    assert factor.damping == 0.01


@pytest.mark.parametrize("consume", [False, True])
def test_factor_may_take_the_hessians_memory(consume: bool) -> None:
    inputs = torch.randn(2000, 600, generator=torch.Generator().manual_seed(0))
    hessian = (inputs.T @ inputs + (inputs.T @ inputs).T) / 2000
    plan = LinearPlan((Segment(100, HIGH, 0), Segment(500, LOW, 1)), (8, 4))
    order = torch.tensor(column_order(plan))
    given = hessian.clone()
    factor = factorise(given, plan, consume=consume)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(600)
    expected = torch.linalg.inv(damped.double())[order][:, order]
    assert torch.equal(factor.upper, factor.upper.triu())
    torch.testing.assert_close((factor.upper.T @ factor.upper).double(), expected, rtol=1e-3, atol=1e-3)
    assert (factor.upper.data_ptr() == given.data_ptr()) is consume
    assert torch.equal(given, hessian) is not consume


def test_hessian_that_float32_cannot_factorise_is_retried_in_float64(caplog: pytest.LogCaptureFixture) -> None:
    hessian = torch.ones(8, 8, dtype=torch.float64) + 1e-9 * torch.eye(8, dtype=torch.float64)
    with caplog.at_level(logging.WARNING, logger="resq.quantize"):
        factor = factorise(hessian, one_part(8), damping=0.0, name="model.layers.3.mlp.down_proj")
    assert "model.layers.3.mlp.down_proj: the Hessian factorised only as torch.float64" in caplog.text
    expected = torch.linalg.inv(hessian)
    torch.testing.assert_close((factor.upper.T @ factor.upper).double(), expected, rtol=1e-3, atol=1.0)


def test_damping_grows_for_an_indefinite_hessian(caplog: pytest.LogCaptureFixture) -> None:
    hessian = torch.eye(6)
    hessian[0, 1] = hessian[1, 0] = 1.05  # smallest eigenvalue −0.05
    with caplog.at_level(logging.WARNING, logger="resq.quantize"):
        assert factorise(hessian, one_part(6)).damping == pytest.approx(0.1)
    assert "damping 0.1" in caplog.text


def test_hessian_that_never_factorises_names_the_layer() -> None:
    with pytest.raises(ResQError, match=r"^layers\.7\.q_proj: .* not positive definite .* --rtn"):
        factorise(-torch.eye(4), one_part(4), name="layers.7.q_proj")


def test_hessian_with_nan_names_the_layer() -> None:
    with pytest.raises(ResQError, match=r"^layers\.7\.mlp\.up_proj: .* NaN"):
        factorise(torch.full((4, 4), torch.nan), one_part(4), name="layers.7.mlp.up_proj")


def test_factor_of_another_width_is_refused() -> None:
    with pytest.raises(ResQError, match="Hessian of 3 columns does not fit a weight of 4"):
        gptq(torch.ones(2, 4), HessianFactor(torch.eye(3), 0.01), WeightGrid.of_parts(torch.ones(2, 4), [4], [4]))
