"""Weight quantizers as the methods use them: a float weight in, the values that its quantized form stands for out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from offline.quantize.gptq import HessianFactor, column_order, factorise
from offline.quantize.mixed import quantize_parts
from resq_vllm.formats.plan import LinearPlan


class WeightQuantizer(ABC):
    """For the linears of one site, which share their input.

    ``needs_hessian``: whether :meth:`factor` must be called with the inputs' Hessian first.
    """

    needs_hessian: bool = False

    def factor(self, hessian: torch.Tensor, name: str) -> HessianFactor | None:
        """What the site's linears share of H [K, K], whose memory it may take; ``name``: the layer, for messages."""
        return None

    @abstractmethod
    def quantize(self, weight: torch.Tensor, factor: HessianFactor | None, name: str) -> torch.Tensor:
        """Ŵ float32 [N, K] of W [N, K]."""

    @abstractmethod
    def bits(self, rows: int, columns: int) -> float:
        """Mean bits a weight of a [rows, columns] linear, corrections included (scales are not counted)."""


class Unquantized(WeightQuantizer):
    """16 bits."""

    def quantize(self, weight: torch.Tensor, factor: HessianFactor | None, name: str) -> torch.Tensor:
        return weight

    def bits(self, rows: int, columns: int) -> float:
        return 16.0


class PartWeights(WeightQuantizer):
    """Symmetric per output channel and part of the plan; GPTQ or round to nearest."""

    def __init__(self, plan: LinearPlan, bits: Sequence[int], gptq: bool = True, clip: bool = True) -> None:
        """``bits``: of each part of ``plan``; ``clip``: search the clip ratio of every scale."""
        self.plan = plan
        self.part_bits = tuple(bits)
        self.needs_hessian = gptq
        self.clip = clip

    def factor(self, hessian: torch.Tensor, name: str) -> HessianFactor | None:
        return factorise(hessian, self.plan, name=name, consume=True)

    def quantize(self, weight: torch.Tensor, factor: HessianFactor | None, name: str) -> torch.Tensor:
        codes, grid = quantize_parts(weight, factor, self.plan, self.part_bits, self.clip, name)
        values = torch.empty(weight.shape, device=weight.device)
        values[:, column_order(self.plan)] = grid.values(codes)
        return values

    def bits(self, rows: int, columns: int) -> float:
        return sum(bits * len(self.plan.part_index(part)) for part, bits in enumerate(self.part_bits)) / columns
