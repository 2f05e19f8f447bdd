"""A quantized layer as it will be served: fake-quantized activations and KV cache around its dequantized weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from offline.models.layer import LoadedLayer
from offline.pipeline.layers import LayerQuantizer
from offline.quantize.activations import ActivationQuantizer, KVQuantizer
from resq_vllm.formats.kv_layout import KVLayout
from resq_vllm.formats.metadata import SITES, QuantizationMetadata


def served_layer(
    quantizer: LayerQuantizer,
    metadata: QuantizationMetadata,
    index: int,
    tensors: Mapping[str, torch.Tensor],
    rotation: torch.Tensor,
) -> LoadedLayer:
    """Layer ``index`` from its checkpoint tensors; rotation: U_C [hd, hd]."""
    layer = quantizer.restore(index, tensors)
    for site in SITES:
        if not quantizer.site_ignored(index, site):
            layer.transforms[site] = ActivationQuantizer.of_plan(quantizer.plans[site])
    cache = metadata.kv_cache[index]
    if cache.low_bits != 16:
        layout = KVLayout(metadata.head_dim, cache.high, cache.low_bits)
        layer.attention_hook = KVQuantizer.of_layout(layout, rotation).hook()
    return layer
