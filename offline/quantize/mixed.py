"""A quantized linear layer: 4-bit (or 8-bit) low columns and 8-bit high columns, with the plan that orders them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from offline.quantize.gptq import HessianFactor, factorise, gptq
from offline.quantize.rtn import rtn
from resq_vllm.errors import ResQError
from resq_vllm.formats.plan import HIGH, LOW, LinearPlan


@dataclass(frozen=True)
class QuantizedLinear:
    """Integer codes of a weight [N, K] and what turns them back.

    Attributes:
        low: int8 [N, K_low], signed codes of ``low_bits`` bits, in x-column order of the low part.
        high: int8 [N, K_high], signed 8-bit codes. A part without columns has width 0.
        low_scale: float32 [N]; 0 when the part has no columns.
        high_scale: float32 [N]; 0 when the part has no columns.
        plan: which of x's columns each part holds.
        low_bits: 4 or 8.
        high_bits: 8.

    """

    low: torch.Tensor
    high: torch.Tensor
    low_scale: torch.Tensor
    high_scale: torch.Tensor
    plan: LinearPlan
    low_bits: int = 4
    high_bits: int = 8

    @property
    def rows(self) -> int:
        """N, the output channels."""
        return self.low.shape[0]

    def dequantize(self) -> torch.Tensor:
        """Ŵ float32 [N, K] in x-column order (after the online Hadamard, where the plan has one)."""
        weight = torch.empty(self.rows, self.plan.columns, device=self.low.device)
        weight[:, self.plan.part_index(LOW)] = self.low * self.low_scale[:, None]
        weight[:, self.plan.part_index(HIGH)] = self.high * self.high_scale[:, None]
        return weight


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
    if weight.shape[1] != plan.columns:
        raise ResQError(f"{name}: the weight has {weight.shape[1]} input columns where the plan has {plan.columns}")
    if not bool(torch.isfinite(weight).all()):
        raise ResQError(f"{name}: the weight holds NaN or infinite values; check the model's files")
    low_index, high_index = plan.part_index(LOW), plan.part_index(HIGH)
    weight = weight.float()
    low_scale: torch.Tensor
    if hessian is None:
        low, low_scale = rtn(weight[:, low_index], low_bits, clip)
        high, high_scale = rtn(weight[:, high_index], high_bits, clip)
    else:
        factor = hessian if isinstance(hessian, HessianFactor) else factorise(hessian, plan, name=name)
        ordered = weight[:, low_index + high_index]
        result = gptq(ordered, factor, len(low_index), low_bits, high_bits, clip)
        low, high, low_scale, high_scale = result.low, result.high, result.low_scale, result.high_scale
    if not low_index:
        low_scale = torch.zeros_like(low_scale)
    if not high_index:
        high_scale = torch.zeros_like(high_scale)
    return QuantizedLinear(low, high, low_scale, high_scale, plan, low_bits, high_bits)
