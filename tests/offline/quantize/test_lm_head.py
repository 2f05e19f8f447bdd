"""A quantized lm_head: chunks of rows, scales of rows, GPTQ, and the head that is evaluated."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from offline.models.runner import LayerRunner
from offline.models.source import ModelSource
from offline.quantize import lm_head
from offline.quantize.hessian import weighted_error
from offline.quantize.lm_head import OutputHead, head_hessian, quantize_lm_head, reads_calibration
from offline.quantize.weights import symmetric_scale
from resq_vllm import reference
from resq_vllm.errors import ResQError
from resq_vllm.formats.metadata import LinearSite
from tests.offline.models.tiny import save_tiny

EIGHT = LinearSite(low=0, high=24)
FOUR = LinearSite(low=20, high=4, act_low_bits=8)
SITES = pytest.mark.parametrize("site", [EIGHT, FOUR], ids=["8", "4"])


def table(rows: int = 50, columns: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    # Rows of very different size, one of zeros.
    weight = torch.randn(rows, columns, generator=generator) * torch.logspace(-4, 2, rows)[:, None]
    weight[7] = 0
    return weight


def hessian(columns: int = 24) -> torch.Tensor:
    """Of inputs whose columns hang together."""
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(200, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return 2 / len(inputs) * inputs.T @ inputs


def test_every_row_uses_its_whole_range() -> None:
    weight = table()
    found = quantize_lm_head(weight, EIGHT)
    assert found.low.shape == (50, 0)
    assert found.high.abs().amax(1).tolist() == [0 if row == 7 else 127 for row in range(50)]
    assert torch.equal(found.high_scale[8:], weight.abs().amax(1)[8:] / 127)
    step = found.high_scale[:, None]
    assert bool(((found.dequantize() - weight).abs() <= step * 0.5001).all())


def test_low_and_high_columns_have_scales_of_their_own() -> None:
    weight = table()
    weight[:, 20:] *= 10
    found = quantize_lm_head(weight, FOUR)
    assert (found.low.shape, found.high.shape) == ((50, 20), (50, 4))
    assert (int(found.low.min()), int(found.low.max())) == (-8, 7)
    # Each clipped for itself.
    assert torch.equal(found.low_scale, symmetric_scale(weight[:, :20], 4))
    assert torch.equal(found.high_scale, symmetric_scale(weight[:, 20:], 8))
    low, high = (found.dequantize() - weight).split([20, 4], 1)
    assert bool((low.abs() <= 0.5001 * found.low_scale[:, None])[found.low.abs() < 7].all())
    assert bool((high.abs() <= 0.5001 * found.high_scale[:, None])[found.high.abs() < 127].all())


def test_gptq_has_the_smaller_error_of_outputs() -> None:
    weight = table()
    nearest = quantize_lm_head(weight, FOUR)
    swept = quantize_lm_head(weight, FOUR, hessian())
    assert torch.equal(nearest.low_scale, swept.low_scale)
    errors = [weighted_error(weight, found.dequantize(), hessian()) for found in (swept, nearest)]
    assert errors[0] < 0.7 * errors[1]


def test_only_low_columns_are_worth_a_hessian() -> None:
    assert [reads_calibration(site, rtn=False) for site in (None, EIGHT, FOUR)] == [False, False, True]
    assert not reads_calibration(FOUR, rtn=True)


def test_hessian_is_of_what_lm_head_reads(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    runner = LayerRunner(ModelSource.open(str(tmp_path)))
    width = runner.adapter.hidden_size
    generator = torch.Generator().manual_seed(2)
    hiddens = [torch.randn(3, 7, width, generator=generator) * 9, torch.randn(1, 5, width, generator=generator)]
    norm = torch.rand(width, generator=generator) + 0.5
    found = head_hessian(runner, norm, hiddens)
    rows = torch.cat([hidden.flatten(0, 1) for hidden in hiddens])
    inputs = rows / (rows.square().mean(1, keepdim=True) + runner.config.rms_norm_eps).sqrt() * norm
    torch.testing.assert_close(found, 2 / 26 * inputs.T @ inputs, rtol=1e-4, atol=1e-4)


@SITES
def test_chunks_make_no_difference(site: LinearSite, monkeypatch: pytest.MonkeyPatch) -> None:
    moments = hessian() if site.low else None
    whole = quantize_lm_head(table(), site, moments, lambda rows: rows * 3)
    moments = hessian() if site.low else None
    monkeypatch.setattr(lm_head, "ROW_CHUNK", 16)
    seen: list[int] = []

    def fused(rows: torch.Tensor) -> torch.Tensor:
        seen.append(len(rows))
        return rows * 3

    told: list[tuple[int, int]] = []
    parts = quantize_lm_head(table(), site, moments, fused, lambda done, rows: told.append((done, rows)))
    assert seen == [16, 16, 16, 2]
    assert told == [(16, 50), (32, 50), (48, 50), (50, 50)]
    for name in ("low", "high", "low_scale", "high_scale"):
        assert torch.equal(getattr(parts, name), getattr(whole, name))


def test_bfloat16_table_is_rounded_from_float32() -> None:
    weight = table().bfloat16()
    found, wanted = quantize_lm_head(weight, EIGHT), quantize_lm_head(weight.float(), EIGHT)
    assert torch.equal(found.dequantize(), wanted.dequantize())


def test_weight_that_is_not_finite_is_refused() -> None:
    weight = table()
    weight[3, 4] = torch.nan
    with pytest.raises(ResQError, match="lm_head: the weight holds NaN or infinite values"):
        quantize_lm_head(weight, EIGHT)


def test_hessian_that_is_not_finite_is_refused() -> None:
    moments = hessian()
    moments[3, 4] = torch.inf
    with pytest.raises(ResQError, match="lm_head: the calibration Hessian holds NaN or infinite values"):
        quantize_lm_head(table(), FOUR, moments)


@SITES
def test_evaluated_head_is_the_served_one(site: LinearSite) -> None:
    linear = quantize_lm_head(table(), site)
    head = OutputHead.of_quantized(torch.ones(24), linear)
    x = torch.randn(6, 24, generator=torch.Generator().manual_seed(1))
    served = reference.linear(x, linear.low, linear.high, linear.low_scale, linear.high_scale, linear.plan)
    torch.testing.assert_close(head.rounding(x) @ head.weight.T, served, rtol=1e-5, atol=1e-4)
    assert not torch.equal(head.rounding(x), x)


def test_float_head_rounds_nothing() -> None:
    x = torch.randn(6, 24)
    assert OutputHead(torch.ones(24), table()).rounding(x) is x
