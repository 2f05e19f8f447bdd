"""A quantized layer as it will be served: fake-quantized activations and KV cache around its dequantized weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from offline.models.layer import LoadedLayer
from offline.pipeline.layers import LayerQuantizer


def served_layer(
    quantizer: LayerQuantizer, index: int, tensors: Mapping[str, torch.Tensor], rotation: torch.Tensor | None
) -> LoadedLayer:
    """Layer ``index`` from its checkpoint tensors; rotation: U_C [hd, hd], None for a method without one."""
    layer = quantizer.restore(index, tensors)
    quantizer.set_rounding(layer, rotation)
    return layer
