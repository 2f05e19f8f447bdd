"""LQER and L²QER: 4-bit weights with a low-rank correction, 8-bit activations, K and V in 16 bits."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch

from offline.methods.lab import Lab
from offline.methods.method import LayerPlan, Method, Prepared, SiteQuantization
from offline.methods.plain import site_width
from offline.methods.plans import uniform_plan
from offline.pipeline.lqer import weight_group
from offline.quantize.activations import ActivationQuantizer
from offline.quantize.gptq import HessianFactor
from offline.quantize.groupwise import GROUP, groupwise
from offline.quantize.linear_weights import WeightQuantizer
from offline.quantize.lowrank import LowRank, activation_scale, low_rank
from offline.quantize.mxint import BLOCK, mxint, mxint_bits
from resq_vllm.formats.metadata import SITES, SiteName

_SCALE_BITS = 32
_FACTOR_BITS = 16


class CorrectedWeights(WeightQuantizer):
    """Ŵ + (A·B)ᵀ: the correction acts on the same rounded input, so it can be added to the weight."""

    def __init__(self, rank: int, scale: torch.Tensor | None) -> None:
        """``scale``: s [K] of L²QER, None for LQER."""
        self.rank = rank
        self._scale = scale

    @abstractmethod
    def rounded(self, weight: torch.Tensor) -> torch.Tensor:
        """Ŵ before the correction."""

    def factors(self, correction: LowRank) -> LowRank:
        """A and B as they are kept."""
        return correction

    def quantize(self, weight: torch.Tensor, factor: HessianFactor | None, name: str) -> torch.Tensor:
        quantized = self.rounded(weight)
        return quantized + self.factors(low_rank(weight, quantized, self.rank, self._scale, name)).weight()


class GroupwiseWeights(CorrectedWeights):
    """Symmetric 4-bit integers in groups, as the served checkpoint has them; factors in the model's 16 bits."""

    def __init__(self, rank: int, scale: torch.Tensor | None, group: int, dtype: torch.dtype) -> None:
        super().__init__(rank, scale)
        self._group, self._dtype = group, dtype

    def rounded(self, weight: torch.Tensor) -> torch.Tensor:
        return groupwise(weight, self._group).dequantize()

    def factors(self, correction: LowRank) -> LowRank:
        return correction.to(self._dtype).to(torch.float32)

    def bits(self, rows: int, columns: int) -> float:
        return 4 + _SCALE_BITS / self._group + _FACTOR_BITS * self.rank * (rows + columns) / (rows * columns)


class MxintWeights(CorrectedWeights):
    """MXINT4 weights and MXINT8 factors, blocks of 16 along the inputs of each."""

    def rounded(self, weight: torch.Tensor) -> torch.Tensor:
        return mxint(weight, 4)

    def factors(self, correction: LowRank) -> LowRank:
        return LowRank(mxint(correction.a.T, 8).T, mxint(correction.b.T, 8).T)

    def bits(self, rows: int, columns: int) -> float:
        return mxint_bits(4) + mxint_bits(8) * self.rank * (rows + columns) / (rows * columns)


@dataclass(frozen=True)
class LQER(Method):
    """W4A8 with a correction of rank k; ``scaled``: L²QER, which weights channels by their activations.

    ``form``: "int" = int4 in groups of 128 and per-token 8-bit activations, as ``resq quantize --method lqer`` has it;
    "mxint" = the paper's MXINT4 weights and MXINT8 activations in blocks of 16.
    """

    name: str = "lqer"
    label: str = "LQER (int4 g128)"
    scaled: bool = False
    form: Literal["int", "mxint"] = "int"
    rank: int = 32
    group: int = GROUP
    max_tp: int = 8
    source: str = "arXiv 2402.02446, equations 8 to 13"

    def settings(self) -> dict[str, object]:
        return {"scaled": self.scaled, "form": self.form, "rank": self.rank, "group": self.group}

    def prepare(self, lab: Lab) -> Prepared:
        return _LQERPrepared(lab, self)


class _LQERPrepared(Prepared):
    def __init__(self, lab: Lab, method: LQER) -> None:
        super().__init__(lab.source)
        self._lab, self._method = lab, method

    def layer(self, index: int) -> LayerPlan:
        return LayerPlan(self.source.layer_tensors(index), {site: self._site(index, site) for site in SITES})

    def _site(self, index: int, site: SiteName) -> SiteQuantization:
        lab, method = self._lab, self._method
        scale = activation_scale(lab.channels[index].inputs[site].mean) if method.scaled else None
        if method.form == "mxint":
            rounding = ActivationQuantizer(rounding=lambda x: mxint(x, 8, BLOCK))
            return SiteQuantization(MxintWeights(method.rank, scale), rounding, mxint_bits(8))
        group = weight_group(lab.adapter, site, method.group, method.max_tp)
        weights = GroupwiseWeights(method.rank, scale, group, self.source.dtype)
        plan = uniform_plan(site_width(lab.adapter, site), 8)
        return SiteQuantization(weights, ActivationQuantizer.of_plan(plan), 8.0)
