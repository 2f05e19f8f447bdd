"""Rounding the model as it is, with and without help for its outliers: RTN, GPTQ, SmoothQuant, QUIK."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import ClassVar

import torch

from offline.methods.lab import Lab
from offline.methods.method import LayerPlan, Method, Prepared, SiteQuantization
from offline.methods.plans import chosen_plan, planned_site, uniform_kv, uniform_site
from offline.models.adapter import SITE_LINEARS, ModelAdapter
from offline.quantize.activations import KVQuantizer
from offline.quantize.rounding import round_columns
from offline.rotate.fuse import NORM_READERS
from resq_vllm.formats.metadata import SITES, SiteName, high_count


def site_width(adapter: ModelAdapter, site: SiteName) -> int:
    """Input columns of a site's linears."""
    return adapter.linear_shape(SITE_LINEARS[site][0])[1]


@dataclass(frozen=True)
class Uniform(Method):
    """Everything at ``bits``: weights per output channel, activations per token, KV per token and head."""

    name: str = "rtn"
    label: str = "RTN"
    bits: int = 4
    gptq: bool = False
    source: str = "round to nearest (clip search on the weights)"

    def settings(self) -> dict[str, object]:
        return {"bits": self.bits, "gptq": self.gptq}

    def prepare(self, lab: Lab) -> Prepared:
        return _UniformPrepared(lab, self)


class _UniformPrepared(Prepared):
    def __init__(self, lab: Lab, method: Uniform) -> None:
        super().__init__(lab.source)
        self._sites = {site: uniform_site(site_width(lab.adapter, site), method.bits, method.gptq) for site in SITES}
        self._kv = uniform_kv(lab.adapter.head_dim, method.bits)
        self._bits = method.bits

    def tensors(self, index: int) -> Mapping[str, torch.Tensor]:
        """The float layer that is rounded."""
        return self.source.layer_tensors(index)

    def layer(self, index: int) -> LayerPlan:
        return LayerPlan(self.tensors(index), self._sites, self._kv, self._bits)


@dataclass(frozen=True)
class SmoothQuant(Uniform):
    """SmoothQuant + GPTQ: activation outliers move into the weights behind each RMSNorm, which folds the scale.

    s_j = max|x_j|^α / max|W_j|^(1−α) over the norm's readers (arXiv 2211.10438, equation 4, α = 0.5).
    """

    name: str = "smoothquant"
    label: str = "SmoothQuant + GPTQ"
    gptq: bool = True
    alpha: float = 0.5
    source: str = "arXiv 2211.10438, equation 4; weights by GPTQ"

    def settings(self) -> dict[str, object]:
        return super().settings() | {"alpha": self.alpha}

    def prepare(self, lab: Lab) -> Prepared:
        return _SmoothPrepared(lab, self)


def smoothing_scale(largest: torch.Tensor, weights: list[torch.Tensor], alpha: float) -> torch.Tensor:
    """s float32 [K] for inputs of magnitude ``largest`` [K] and the weights [N, K] behind them; 1 where either is 0."""
    weight = torch.stack([w.abs().amax(0) for w in weights]).amax(0).float()
    scale = largest.pow(alpha) / weight.pow(1 - alpha)
    return torch.where(torch.isfinite(scale) & (scale > 0), scale, torch.ones_like(scale))


class _SmoothPrepared(_UniformPrepared):
    _SITE: ClassVar[Mapping[str, SiteName]] = {"input": "qkv", "post": "gate_up"}

    def __init__(self, lab: Lab, method: SmoothQuant) -> None:
        super().__init__(lab, method)
        self._adapter, self._channels, self._alpha = lab.adapter, lab.channels, method.alpha

    def tensors(self, index: int) -> Mapping[str, torch.Tensor]:
        tensors = {name: value.float() for name, value in super().tensors(index).items()}
        for norm, readers in NORM_READERS.items():
            keys = [self._adapter.linear(index, name) + ".weight" for name in readers]
            largest = self._channels[index].inputs[self._SITE[norm]].largest
            scale = smoothing_scale(largest, [tensors[key] for key in keys], self._alpha)
            tensors[self._adapter.norm(index, norm)] = tensors[self._adapter.norm(index, norm)] / scale
            for key in keys:
                tensors[key] = tensors[key] * scale
        return tensors


@dataclass(frozen=True)
class Quik(Method):
    """QUIK: the input channels of largest magnitude stay at 8 bits, in place, and come last in the GPTQ sweep.

    As the ResQ paper compares it: the same share of channels at the same bits as ResQ, at every site, and of K's and
    V's dims. (QUIK's own release keeps 256 channels in 16 bits, down_proj at 8 bits, and K and V unquantized.)
    """

    high_fraction: float = 0.125
    low_bits: int = 4
    high_bits: int = 8
    name: str = "quik"
    label: str = "QUIK"
    source: str = "arXiv 2310.09259, section 3: outlier channels by max |x| of calibration"

    def settings(self) -> dict[str, object]:
        values = asdict(self)
        return {key: values[key] for key in ("high_fraction", "low_bits", "high_bits")}

    def prepare(self, lab: Lab) -> Prepared:
        return _QuikPrepared(lab, self)


class _QuikPrepared(Prepared):
    def __init__(self, lab: Lab, method: Quik) -> None:
        super().__init__(lab.source)
        self._adapter, self._channels, self._method = lab.adapter, lab.channels, method

    def layer(self, index: int) -> LayerPlan:
        method, channels = self._method, self._channels[index]
        bits = (method.low_bits, method.high_bits)
        sites: dict[SiteName, SiteQuantization] = {}
        for site in SITES:
            columns = site_width(self._adapter, site)
            plan = chosen_plan(columns, _strongest(channels.inputs[site].largest, method.high_fraction), bits)
            sites[site] = planned_site(plan, bits, gptq=True)
        key, value = (_split(x.largest, method.high_fraction) for x in (channels.key, channels.value))
        kv = KVQuantizer(None, lambda x: round_columns(x, key, bits), lambda x: round_columns(x, value, bits))
        mean = (len(key[0]) * bits[0] + len(key[1]) * bits[1]) / self._adapter.head_dim
        return LayerPlan(self.source.layer_tensors(index), sites, kv, mean)


def _strongest(magnitude: torch.Tensor, fraction: float) -> torch.Tensor:
    return magnitude.topk(high_count(len(magnitude), fraction)).indices.sort().values


def _split(magnitude: torch.Tensor, fraction: float) -> tuple[torch.Tensor, torch.Tensor]:
    high = _strongest(magnitude, fraction)
    low = torch.ones(len(magnitude), dtype=torch.bool)
    low[high] = False
    return low.nonzero().flatten(), high
