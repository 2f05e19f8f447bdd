"""A quantized linear layer: 4-bit (or 8-bit) low columns and 8-bit high columns, with the plan that orders them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from offline.finite import all_finite
from offline.quantize.gptq import HessianFactor, column_order, factorise, gptq
from offline.quantize.groupwise import expand_scale
from offline.quantize.lowrank import LowRank
from offline.quantize.weights import WeightGrid, code_range
from resq_vllm.errors import ResQError
from resq_vllm.formats.plan import HIGH, LOW, LinearPlan


@dataclass(frozen=True)
class QuantizedLinear:
    """Integer codes of a weight [N, K] and what turns them back.

    Attributes:
        low: int8 [N, K_low], signed codes of ``low_bits`` bits, in x-column order of the low part.
        high: int8 [N, K_high], signed 8-bit codes. A part without columns has width 0.
        low_scale: float32 [N], or [N, groups] where the plan has weight groups; 0 when the part has no columns.
        high_scale: float32 [N]; 0 when the part has no columns.
        plan: which of x's columns each part holds.
        low_bits: 4 or 8.
        high_bits: 8.
        correction: A and B in the dtype in which they are stored, or None.

    """

    low: torch.Tensor
    high: torch.Tensor
    low_scale: torch.Tensor
    high_scale: torch.Tensor
    plan: LinearPlan
    low_bits: int = 4
    high_bits: int = 8
    correction: LowRank | None = None

    @property
    def rows(self) -> int:
        """N, the output channels."""
        return self.low.shape[0]

    def dequantize(self) -> torch.Tensor:
        """Ŵ float32 [N, K] in x-column order (after the online Hadamard, where the plan has one), correction added."""
        weight = torch.empty(self.rows, self.plan.columns, device=self.low.device)
        weight[:, self.plan.part_index(LOW)] = self.low * self.low_column_scale
        weight[:, self.plan.part_index(HIGH)] = self.high * self.high_scale[:, None]
        return weight if self.correction is None else weight + self.correction.weight().float()

    def part(self, rows: slice) -> QuantizedLinear:
        """Some of the output channels."""
        return replace(
            self,
            low=self.low[rows],
            high=self.high[rows],
            low_scale=self.low_scale[rows],
            high_scale=self.high_scale[rows],
            correction=None if self.correction is None else replace(self.correction, b=self.correction.b[:, rows]),
        )

    def nearest(self, weight: torch.Tensor) -> QuantizedLinear:
        """``weight`` [N, K] rounded to nearest on this one's scales, without correction."""

        def codes(part: int, scale: torch.Tensor, bits: int) -> torch.Tensor:
            # An absent part has scale 0, and no columns to divide.
            scaled = weight[:, self.plan.part_index(part)].float() / scale
            return scaled.round_().clamp_(*code_range(bits)).to(torch.int8)

        low = codes(LOW, self.low_column_scale, self.low_bits)
        high = codes(HIGH, self.high_scale[:, None], self.high_bits)
        return replace(self, low=low, high=high, correction=None)

    @property
    def low_column_scale(self) -> torch.Tensor:
        """low_scale by column of the low part, broadcastable to [N, K_low]."""
        group = self.plan.weight_group
        return expand_scale(self.low_scale, group, self.low.shape[1]) if group else self.low_scale[:, None]


def quantize_linear(
    weight: torch.Tensor,
    hessian: torch.Tensor | HessianFactor | None,
    plan: LinearPlan,
    low_bits: int = 4,
    high_bits: int = 8,
    clip: bool = True,
    name: str = "layer",
) -> QuantizedLinear:
    """Quantize one rotated weight.

    Args:
        weight: [N, K] of any float type, K in x-column order (after the online Hadamard).
        hessian: H [K, K] in the same order, its :class:`HessianFactor` (shared by q, k, v or gate, up: see
            :func:`offline.quantize.gptq.factorise`), or None for round-to-nearest.
        plan: the layer's columns, all ranks together.
        low_bits: bits of the low part, 4 or 8.
        high_bits: bits of the high part, 8.
        clip: search the clip ratio of every scale.
        name: the layer, for messages.

    Raises ResQError naming the layer when shapes disagree or the weight or the Hessian is unusable.

    """
    codes, grid = quantize_parts(weight, hessian, plan, (low_bits, high_bits), clip, name)
    low_columns, _ = plan.part_columns
    low_scale, high_scale = (
        scale if columns else torch.zeros_like(scale)
        for scale, columns in zip(grid.scale, plan.part_columns, strict=True)
    )
    low, high = codes[:, :low_columns].contiguous(), codes[:, low_columns:].contiguous()
    return QuantizedLinear(low, high, low_scale, high_scale, plan, low_bits, high_bits)


def quantize_parts(
    weight: torch.Tensor,
    hessian: torch.Tensor | HessianFactor | None,
    plan: LinearPlan,
    bits: Sequence[int],
    clip: bool = True,
    name: str = "layer",
) -> tuple[torch.Tensor, WeightGrid]:
    """As :func:`quantize_linear`, for any number of parts with ``bits[part]`` bits each.

    Returns codes int8 [N, K] in part order (:func:`offline.quantize.gptq.column_order`) and their grid.
    """
    if weight.shape[1] != plan.columns:
        raise ResQError(f"{name}: the weight has {weight.shape[1]} input columns where the plan has {plan.columns}")
    if not all_finite(weight):
        raise ResQError(f"{name}: the weight holds NaN or infinite values; check the model's files")
    ordered = weight.float()[:, column_order(plan)]
    grid = WeightGrid.of_parts(ordered, [len(plan.part_index(part)) for part in range(len(bits))], bits, clip)
    if hessian is None:
        return grid.round(ordered), grid
    factor = hessian if isinstance(hessian, HessianFactor) else factorise(hessian, plan, name=name)
    return gptq(ordered, factor, grid), grid
