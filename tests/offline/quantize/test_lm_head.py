"""lm_head at 8 bits: chunks of rows, scales of rows, and the head that is evaluated."""

from __future__ import annotations

import pytest
import torch

from offline.quantize import lm_head
from offline.quantize.lm_head import OutputHead, quantize_lm_head
from resq_vllm import reference
from resq_vllm.errors import ResQError


def table(rows: int = 50, columns: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    # Rows of very different size, one of zeros.
    weight = torch.randn(rows, columns, generator=generator) * torch.logspace(-4, 2, rows)[:, None]
    weight[7] = 0
    return weight


def test_every_row_uses_its_whole_range() -> None:
    weight = table()
    found = quantize_lm_head(weight)
    assert found.low.shape == (50, 0)
    assert found.high.abs().amax(1).tolist() == [0 if row == 7 else 127 for row in range(50)]
    assert torch.equal(found.high_scale[8:], weight.abs().amax(1)[8:] / 127)
    step = found.high_scale[:, None]
    assert bool(((found.dequantize() - weight).abs() <= step * 0.5001).all())


def test_chunks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = quantize_lm_head(table(), lambda rows: rows * 3)
    monkeypatch.setattr(lm_head, "ROW_CHUNK", 16)
    seen: list[int] = []

    def fused(rows: torch.Tensor) -> torch.Tensor:
        seen.append(len(rows))
        return rows * 3

    parts = quantize_lm_head(table(), fused)
    assert seen == [16, 16, 16, 2]
    for name in ("low", "high", "low_scale", "high_scale"):
        assert torch.equal(getattr(parts, name), getattr(whole, name))


def test_bfloat16_table_is_rounded_from_float32() -> None:
    weight = table().bfloat16()
    assert torch.equal(quantize_lm_head(weight).dequantize(), quantize_lm_head(weight.float()).dequantize())


def test_weight_that_is_not_finite_is_refused() -> None:
    weight = table()
    weight[3, 4] = torch.nan
    with pytest.raises(ResQError, match="lm_head: the weight holds NaN or infinite values"):
        quantize_lm_head(weight)


def test_evaluated_head_is_the_served_one() -> None:
    linear = quantize_lm_head(table())
    head = OutputHead.of_quantized(torch.ones(24), linear)
    x = torch.randn(6, 24, generator=torch.Generator().manual_seed(1))
    served = reference.linear(x, linear.low, linear.high, linear.low_scale, linear.high_scale, linear.plan)
    torch.testing.assert_close(head.rounding(x) @ head.weight.T, served, rtol=1e-5, atol=1e-4)
    assert not torch.equal(head.rounding(x), x)


def test_float_head_rounds_nothing() -> None:
    x = torch.randn(6, 24)
    assert OutputHead(torch.ones(24), table()).rounding(x) is x
