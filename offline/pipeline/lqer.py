"""``resq quantize --method lqer`` and ``l2qer``: 4-bit weights in groups, 8-bit activations, a low-rank correction.

The comparison method of arXiv 2402.02446 in this project's checkpoint format, served by the same kernels: weights are
symmetric integers with a scale per output channel and group of input columns, a token's input has one 8-bit scale, and
every linear adds (x·A)·B. Nothing is rotated and norms keep their weights; K and V stay in 16 bits unless --kv-bits
says otherwise (they are packed unrotated then). L²QER calibrates channel magnitudes on the float model first; LQER
needs no calibration at all. One decoder layer is in memory at a time.
"""

from __future__ import annotations

from functools import cached_property
from typing import Literal

import torch

from offline.calibrate.channels import collect_channels
from offline.card import model_card
from offline.models.adapter import SITE_LINEARS, LinearName, ModelAdapter
from offline.models.layer import LoadedLayer
from offline.pack.names import key_rotation_name
from offline.pack.tensors import linear_tensors
from offline.pipeline.job import Job, bar, step
from offline.pipeline.layers import LayerQuantizer
from offline.pipeline.options import QuantizeOptions
from offline.pipeline.publish import publish
from offline.pipeline.served import served_layer
from offline.pipeline.sites import build_kv_layers, ignored_modules
from offline.quantize.groupwise import fitting_group, groupwise
from offline.quantize.lowrank import activation_scale, low_rank
from offline.quantize.mixed import QuantizedLinear
from offline.report.stats import CheckpointStats, PerplexityRecord
from resq_vllm import __version__
from resq_vllm.formats.metadata import SITES, KVLayer, LinearSite, QuantizationMetadata, SiteName, format_version

ACTIVATION_BITS: Literal[8] = 8
_CHANNELS = "channels"


def lqer_metadata(adapter: ModelAdapter, options: QuantizeOptions) -> QuantizationMetadata:
    """The quantization_config; raises ResQError where options and model do not fit."""
    return QuantizationMetadata(
        format_version=format_version(options.lm_head_bits),
        tool_version=__version__,
        high_fraction=0.0,
        head_dim=adapter.head_dim,
        max_tp=options.max_tp,
        sites={site: _site(adapter, site, options) for site in SITES},
        kv_cache=[KVLayer(low_bits=layer.low_bits) for layer in build_kv_layers(adapter, options)],
        lm_head_bits=options.lm_head_bits,
        ignore=ignored_modules(adapter, options.ignore_layers),
        recipe=options.recipe(),
    )


def _site(adapter: ModelAdapter, site: SiteName, options: QuantizeOptions) -> LinearSite:
    columns = adapter.linear_shape(SITE_LINEARS[site][0])[1]
    return LinearSite(
        low=columns,
        high=0,
        weight_low_bits=options.low_bits,
        act_low_bits=ACTIVATION_BITS,
        scales="token",
        weight_group=weight_group(adapter, site, options.weight_group, options.max_tp),
        low_rank=options.rank,
    )


def weight_group(adapter: ModelAdapter, site: SiteName, group: int, max_tp: int) -> int:
    """Columns that share a weight scale: the largest divisor up to ``group`` of what every rank gets.

    Ranks split the inputs of o and down only, by the tensor-parallel degrees that are a power of two up to --max-tp and
    divide heads and input. A width of 192 has groups of 96 where 128 were asked for.
    """
    columns = adapter.linear_shape(SITE_LINEARS[site][0])[1]
    degree = 1
    if site in ("o", "down"):
        while 2 * degree <= max_tp and adapter.num_heads % (2 * degree) == 0 and columns % (2 * degree) == 0:
            degree *= 2
    return fitting_group(columns // degree, group)


class LQERJob(Job):
    """LQER's steps: magnitudes (L²QER), every layer by itself, perplexities, the folder."""

    @cached_property
    def quantizer(self) -> LayerQuantizer:
        """Rebuilds finished layers; its own quantization is not used."""
        return LayerQuantizer(self.runner, self.metadata, self.source.dtype, rtn=True)

    def all(self) -> None:
        scales = self.activation_scales() if self.options.method == "l2qer" else None
        with bar("(2/3) quantizing", self.adapter.num_layers) as update:
            for index in range(self.adapter.num_layers):
                if not self.work.has(step(index)):
                    self.work.save(step(index), self.layer(index, scales))
                update(index + 1, self.adapter.num_layers)
        before, after = self.perplexities(self.served)
        publish(
            self.options.output,
            self.source,
            self.metadata,
            self.embedding,
            self.layer_tensors,
            self.head,
            None,
            model_card(self.source, self.metadata, self.options.output.name, before, after),
            CheckpointStats(
                tool_version=__version__,
                perplexity_before=PerplexityRecord.of(before),
                perplexity_after=PerplexityRecord.of(after),
            ),
            self.work.path,
        )

    def embedding(self) -> torch.Tensor:
        return self.source.embedding()

    def head(self) -> dict[str, torch.Tensor]:
        # Stored beside the embedding even where the model ties them: the format knows untied models only.
        norm = {self.adapter.final_norm: self.source.final_norm()}
        return norm | self.head_tensors(lambda rows, dtype: rows.to(dtype))

    def activation_scales(self) -> dict[str, torch.Tensor]:
        """s [K] of every site by "layer.site", or what an earlier run saved of them."""
        if not self.work.has(_CHANNELS):
            with bar("(1/3) calibrating", self.adapter.num_layers) as update:
                found = collect_channels(self.runner, self.sequences, update, self.batch_tokens)
            means = {f"{i}.{site}": layer.inputs[site].mean.cpu() for i, layer in enumerate(found) for site in SITES}
            self.work.save(_CHANNELS, means)
        return {name: activation_scale(mean) for name, mean in self.work.load(_CHANNELS).items()}

    def layer(self, index: int, scales: dict[str, torch.Tensor] | None) -> dict[str, torch.Tensor]:
        """Checkpoint tensors of layer ``index``."""
        original = self.source.layer_tensors(index)
        tensors = {name: original[name].to(self.source.dtype) for name in self.adapter.norm_shapes(index)}
        for site in SITES:
            scale = None if scales is None else scales[f"{index}.{site}"]
            for name in SITE_LINEARS[site]:
                tensors |= self._linear(index, site, name, original, scale)
        if self.metadata.kv_cache[index].low_bits != 16:
            attention = self.adapter.layer_prefix(index) + self.adapter.attention_path
            tensors[key_rotation_name(attention)] = torch.eye(self.adapter.head_dim)
        return tensors

    def _linear(
        self,
        index: int,
        site: SiteName,
        name: LinearName,
        original: dict[str, torch.Tensor],
        scale: torch.Tensor | None,
    ) -> dict[str, torch.Tensor]:
        module = self.adapter.linear(index, name)
        stored = {n: original[n].to(self.source.dtype) for n in (f"{module}.weight", f"{module}.bias") if n in original}
        if module in self.metadata.ignore:
            return stored
        spec, device = self.metadata.sites[site], self.runner.device
        weight = original[f"{module}.weight"].to(device)
        quantized = groupwise(weight, spec.weight_group, spec.weight_low_bits)
        correction = None
        if spec.low_rank:
            scale = None if scale is None else scale.to(device)
            correction = low_rank(weight, quantized.dequantize(), spec.low_rank, scale, module).to(self.source.dtype)
        packed = QuantizedLinear(
            quantized.codes,
            quantized.codes[:, :0],
            quantized.scale,
            torch.zeros(weight.shape[0], device=device),
            self.quantizer.plans[site],
            spec.weight_low_bits,
            correction=correction,
        )
        return linear_tensors(packed, module, stored.get(f"{module}.bias"))

    def served(self, index: int) -> LoadedLayer:
        """Layer ``index`` in fake quantization. Its corrections see rounded inputs here, as in the paper."""
        return served_layer(self.quantizer, index, self.layer_tensors(index), None)
