"""Quantizes one decoder layer: fused weights in, checkpoint tensors out, and the hidden states moved on.

GPTQ sees the unquantized rotated activations that the already quantized earlier weights produce (method §3), in the
order {q, k, v}, {o}, {gate, up}, {down}.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from offline.models.adapter import SITE_LINEARS, ModelAdapter
from offline.models.layer import LoadedLayer
from offline.models.runner import LayerRunner
from offline.pack.names import key_rotation_name
from offline.pack.tensors import linear_from_tensors, linear_tensors
from offline.quantize.gptq import HessianFactor, factorise
from offline.quantize.hessian import HessianAccumulator
from offline.quantize.mixed import quantize_linear
from resq_vllm.formats.metadata import SITES, QuantizationMetadata, SiteName
from resq_vllm.formats.plan import LinearPlan, linear_plan
from resq_vllm.reference import block_hadamard


def whole_plan(metadata: QuantizationMetadata, site: SiteName) -> LinearPlan:
    """The plan of a site over all ranks."""
    spec = metadata.sites[site]
    return linear_plan(spec, spec.low + spec.high, metadata.head_dim)


class LayerQuantizer:
    """Quantizes layers of one model with one recipe; holds no per-layer state."""

    def __init__(
        self, runner: LayerRunner, metadata: QuantizationMetadata, model_dtype: torch.dtype, rtn: bool = False
    ) -> None:
        """``model_dtype``: what biases, norms and ignored linears are stored in."""
        self._runner = runner
        self._adapter: ModelAdapter = runner.adapter
        self._metadata = metadata
        self._dtype = model_dtype
        self._rtn = rtn
        self.plans: dict[SiteName, LinearPlan] = {site: whole_plan(metadata, site) for site in SITES}

    def quantize(
        self, index: int, fused: Mapping[str, torch.Tensor], rotation: torch.Tensor, hiddens: list[torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Checkpoint tensors of layer ``index``; ``hiddens`` are replaced by the quantized layer's outputs.

        fused: every tensor of the layer after rotation and fusion, by full name; rotation: U_C [hd, hd]; hiddens:
        inputs [B, T, d] in the rotated basis, empty for RTN.
        """
        stored = {name: value.to(self._dtype) for name, value in fused.items()}
        layer = self._loaded(index, dict(fused) | {n: v for n, v in stored.items() if not n.endswith("_proj.weight")})
        tensors = {self._adapter.norm(index, n): stored[self._adapter.norm(index, n)] for n in self._adapter.norm_paths}
        for site in SITES:
            factor = None if self._rtn or self.site_ignored(index, site) else self._factor(layer, site, hiddens)
            for name in SITE_LINEARS[site]:
                module = self._adapter.linear(index, name)
                bias = stored.get(module + ".bias")
                if module in self._metadata.ignore:
                    tensors[module + ".weight"] = stored[module + ".weight"]
                    layer.set_weight(name, stored[module + ".weight"])
                    if bias is not None:
                        tensors[module + ".bias"] = bias
                    continue
                spec = self._metadata.sites[site]
                quantized = quantize_linear(
                    layer.weight(name),
                    factor,
                    self.plans[site],
                    spec.weight_low_bits,
                    spec.weight_high_bits,
                    name=module,
                )
                layer.set_weight(name, quantized.dequantize())
                tensors |= linear_tensors(quantized, module, bias)
        if self._metadata.kv_cache[index].low_bits != 16:
            attention = self._adapter.layer_prefix(index) + self._adapter.attention_path
            tensors[key_rotation_name(attention)] = rotation.float()
        layer.run(hiddens)
        return tensors

    def restore(self, index: int, tensors: Mapping[str, torch.Tensor]) -> LoadedLayer:
        """The layer that :meth:`quantize` left behind, rebuilt from its checkpoint tensors: bit for bit the same."""
        values: dict[str, torch.Tensor] = {}
        for site in SITES:
            for name in SITE_LINEARS[site]:
                module = self._adapter.linear(index, name)
                if module + ".bias" in tensors:
                    values[module + ".bias"] = tensors[module + ".bias"]
                if module + ".weight" in tensors:
                    values[module + ".weight"] = tensors[module + ".weight"]
                    continue
                rows = self._adapter.linear_shape(name)[0]
                packed = linear_from_tensors(
                    tensors.__getitem__, module, rows, self._metadata.sites[site], self.plans[site]
                )
                values[module + ".weight"] = packed.dequantize()
        for norm in self._adapter.norm_paths:
            values[self._adapter.norm(index, norm)] = tensors[self._adapter.norm(index, norm)]
        return self._loaded(index, values)

    def _loaded(self, index: int, tensors: Mapping[str, torch.Tensor]) -> LoadedLayer:
        layer = self._runner.layer(index, tensors)
        groups = self._metadata.sites["down"].hadamard_groups
        if groups and not self.site_ignored(index, "down"):
            layer.transforms["down"] = lambda x: block_hadamard(x, groups)
        return layer

    def site_ignored(self, index: int, site: SiteName) -> bool:
        """Whether that layer's site stays in the model's dtype (q, k, v and gate, up are ignored together)."""
        return self._adapter.linear(index, SITE_LINEARS[site][0]) in self._metadata.ignore

    def _factor(self, layer: LoadedLayer, site: SiteName, hiddens: list[torch.Tensor]) -> HessianFactor:
        plan = self.plans[site]
        accumulator = HessianAccumulator(plan.columns)
        layer.stream_inputs(hiddens, site, accumulator.add)
        return factorise(accumulator.hessian(), plan, name=self._adapter.linear(layer.index, SITE_LINEARS[site][0]))
