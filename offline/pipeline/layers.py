"""Quantizes one decoder layer: fused weights in, checkpoint tensors out, and the hidden states moved on.

Linears are quantized in the order {q, k, v}, {o}, {gate, up}, {down}. By default they read what the finished part of
the model puts out when it is served, everything rounded, and make up for what was lost (offline.quantize.compensate).
Without compensation GPTQ sees, as in the paper, the unrounded activations that the quantized weights before produce.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from offline.models.adapter import SITE_LINEARS, ModelAdapter
from offline.models.layer import LoadedLayer
from offline.models.runner import LayerRunner
from offline.pack.expected import UNPACKED_KV_BITS
from offline.pack.names import key_rotation_name
from offline.pack.tensors import linear_from_tensors, linear_tensors
from offline.quantize.activations import ActivationQuantizer, KVQuantizer
from offline.quantize.compensate import LayerInputs
from offline.quantize.gptq import HessianFactor, factorise
from offline.quantize.mixed import quantize_linear
from offline.report.measure import LayerMeasurement
from resq_vllm.formats.kv_layout import KVLayout
from resq_vllm.formats.metadata import SITES, QuantizationMetadata, SiteName
from resq_vllm.formats.plan import LinearPlan, linear_plan
from resq_vllm.reference import block_hadamard


def whole_plan(metadata: QuantizationMetadata, site: SiteName) -> LinearPlan:
    """The plan of a site over all ranks."""
    spec = metadata.sites[site]
    return linear_plan(spec, spec.low + spec.high, metadata.head_dim)


@dataclass
class CalibrationStates:
    """Hidden states [B, T, d] between two layers, batch by batch: of the quantized model, and of the float one.

    ``reference`` is None where nothing is compensated.
    """

    hiddens: list[torch.Tensor]
    reference: list[torch.Tensor] | None = None


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
        self,
        index: int,
        fused: dict[str, torch.Tensor],
        rotation: torch.Tensor,
        states: CalibrationStates,
        measurement: LayerMeasurement | None = None,
    ) -> dict[str, torch.Tensor]:
        """Checkpoint tensors of layer ``index``; ``states`` are replaced by the layer's outputs.

        fused: every tensor of the layer after rotation and fusion, by full name, which is emptied: their memory serves
        one of the two layers; rotation: U_C [hd, hd]; states: inputs in the rotated basis, of which RTN itself needs
        none; measurement: watches the layer's errors.
        """
        stored = {n: value.to(self._dtype) for n, value in fused.items() if not n.endswith("_proj.weight")}
        compensates = states.reference is not None
        layer = self._loaded(index, fused | stored, copy=compensates)
        reference = self._loaded(index, fused, copy=False) if compensates else None
        fused.clear()
        if measurement is not None:
            measurement.observe(layer, states.hiddens)
        if compensates:
            self.set_rounding(layer, rotation)
        inputs = LayerInputs(layer, states.hiddens, reference, states.reference)
        del reference  # `inputs` lets it go where it has served
        tensors = {name: stored[name] for name in self._adapter.norm_shapes(index)}
        for site in SITES:
            factor = None
            if not self._rtn and not self.site_ignored(index, site):
                factor = self._calibrate(layer, site, inputs)
            for name in SITE_LINEARS[site]:
                module = self._adapter.linear(index, name)
                bias = stored.get(module + ".bias")
                if module in self._metadata.ignore:
                    tensors[module + ".weight"] = layer.weight(name).to(self._dtype)
                    layer.set_weight(name, tensors[module + ".weight"])
                    if bias is not None:
                        tensors[module + ".bias"] = bias
                    continue
                spec = self._metadata.sites[site]
                weight = layer.weight(name)
                quantized = quantize_linear(
                    weight,
                    factor,
                    self.plans[site],
                    spec.weight_low_bits,
                    spec.weight_high_bits,
                    name=module,
                )
                if measurement is not None:
                    measurement.linear(site, name, weight, quantized, nearest=factor is None)
                layer.set_weight(name, quantized.dequantize())
                tensors |= linear_tensors(quantized, module, bias)
        if self._metadata.kv_cache[index].low_bits != UNPACKED_KV_BITS:
            attention = self._adapter.layer_prefix(index) + self._adapter.attention_path
            tensors[key_rotation_name(attention)] = rotation.float()
        layer.run(states.hiddens)
        inputs.finish()
        return tensors

    def skip(
        self,
        index: int,
        fused: Mapping[str, torch.Tensor],
        rotation: torch.Tensor,
        tensors: Mapping[str, torch.Tensor],
        states: CalibrationStates,
    ) -> None:
        """Move ``states`` past a layer that an earlier run finished, as :meth:`quantize` did then."""
        layer = self.restore(index, tensors)
        if states.reference is not None:
            self.set_rounding(layer, rotation)
            self._loaded(index, fused, copy=False).run(states.reference)
        layer.run(states.hiddens)

    def set_rounding(self, layer: LoadedLayer, rotation: torch.Tensor | None) -> None:
        """Make a layer round its activations, K and V as it will when it is served; rotation: U_C [hd, hd] or None."""
        for site in SITES:
            if not self.site_ignored(layer.index, site):
                layer.transforms[site] = ActivationQuantizer.of_plan(self.plans[site])
        cache = self._metadata.kv_cache[layer.index]
        if cache.low_bits != UNPACKED_KV_BITS:
            layout = KVLayout(self._metadata.head_dim, cache.high, cache.low_bits)
            layer.attention_hook = KVQuantizer.of_layout(layout, rotation).hook()

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
        for norm in self._adapter.norm_shapes(index):
            values[norm] = tensors[norm]
        return self._loaded(index, values)

    def _loaded(self, index: int, tensors: Mapping[str, torch.Tensor], copy: bool = True) -> LoadedLayer:
        layer = self._runner.layer(index, tensors, copy)
        groups = self._metadata.sites["down"].hadamard_groups
        if groups and not self.site_ignored(index, "down"):
            layer.transforms["down"] = lambda x: block_hadamard(x, groups)
        return layer

    def site_ignored(self, index: int, site: SiteName) -> bool:
        """Whether that layer's site stays in the model's dtype (q, k, v and gate, up are ignored together)."""
        return self._adapter.linear(index, SITE_LINEARS[site][0]) in self._metadata.ignore

    def _calibrate(self, layer: LoadedLayer, site: SiteName, inputs: LayerInputs) -> HessianFactor:
        """What GPTQ needs for ``site``, whose weights in ``layer`` make up for the losses before them from now on."""
        plan = self.plans[site]
        found = inputs.site(site, plan.columns)
        found.compensate([layer.weight(name) for name in SITE_LINEARS[site]])
        name = self._adapter.linear(layer.index, SITE_LINEARS[site][0])
        return factorise(found.hessian, plan, name=name, consume=True)
