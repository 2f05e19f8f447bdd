"""A quantized layer as it will be served: fake-quantized activations and KV cache around its dequantized weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from offline.models.attention import AttentionHook
from offline.models.layer import LoadedLayer
from offline.pipeline.layers import LayerQuantizer
from resq_vllm.formats.kv_layout import KVLayout
from resq_vllm.formats.metadata import SITES, QuantizationMetadata
from resq_vllm.formats.plan import LinearPlan
from resq_vllm.reference import fake_quantize_activation, kv_fake_quantize


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
            layer.transforms[site] = _activation(quantizer.plans[site])
    cache = metadata.kv_cache[index]
    if cache.low_bits != 16:
        layer.attention_hook = _cache(rotation.float(), KVLayout(metadata.head_dim, cache.high, cache.low_bits))
    return layer


def _activation(plan: LinearPlan) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: fake_quantize_activation(x, plan).to(x.dtype)


def _cache(rotation: torch.Tensor, layout: KVLayout) -> AttentionHook:
    def hook(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return q @ rotation, kv_fake_quantize(k @ rotation, layout), kv_fake_quantize(v, layout)

    return hook
