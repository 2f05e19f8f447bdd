"""The ResQ layers in float arithmetic: a linear layer and an attention function that round what the kernels round.

They compute with x̂ and Ŵ in float32 where the kernels multiply integers, and agree with resq_vllm.reference up to
float32 rounding. transformers models run them: linears are replaced, attention is a registered attention function.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface

from offline.quantize.groupwise import expand_scale
from offline.quantize.mixed import QuantizedLinear
from resq_vllm.formats.kv_layout import KVLayout
from resq_vllm.formats.plan import HIGH, LOW
from resq_vllm.reference import fake_quantize_activation, kv_fake_quantize

ATTENTION_NAME = "resq_reference"
_CACHE_ATTRIBUTE = "resq_kv_cache"


class FakeQuantLinear(nn.Module):
    """y = x̂·Ŵᵀ + (x·A)·B + bias, with x̂ the quantized activations of the plan (after its online Hadamard).

    The low-rank correction, where there is one, takes x as it comes. Codes stay int8 and are expanded for each call, so
    a large model needs one byte a weight.
    """

    low: torch.Tensor
    high: torch.Tensor
    low_scale: torch.Tensor
    high_scale: torch.Tensor
    low_index: torch.Tensor
    high_index: torch.Tensor
    first: torch.Tensor | None
    second: torch.Tensor | None
    bias: torch.Tensor | None

    def __init__(self, linear: QuantizedLinear, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.plan = linear.plan
        self.register_buffer("low", linear.low)
        self.register_buffer("high", linear.high)
        self.register_buffer("low_scale", linear.low_scale)
        self.register_buffer("high_scale", linear.high_scale)
        self.register_buffer("low_index", torch.tensor(linear.plan.part_index(LOW), dtype=torch.long))
        self.register_buffer("high_index", torch.tensor(linear.plan.part_index(HIGH), dtype=torch.long))
        correction = linear.correction
        self.register_buffer("first", None if correction is None else correction.a)
        self.register_buffer("second", None if correction is None else correction.b)
        self.register_buffer("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] of any float type -> [..., N] of the same."""
        quantized = fake_quantize_activation(x, self.plan)
        y = torch.zeros(*x.shape[:-1], self.low.shape[0], device=x.device)
        if len(self.low_index):
            y += self._low(quantized[..., self.low_index])
        if len(self.high_index):
            y += (quantized[..., self.high_index] @ self.high.float().T) * self.high_scale.float()
        if self.first is not None and self.second is not None:
            y += x.float() @ self.first.float() @ self.second.float()
        if self.bias is not None:
            y += self.bias.float()
        return y.to(x.dtype)

    def _low(self, x: torch.Tensor) -> torch.Tensor:
        if not self.plan.weight_group:
            return (x @ self.low.float().T) * self.low_scale.float()
        weight = self.low * expand_scale(self.low_scale.float(), self.plan.weight_group, self.low.shape[1])
        return x @ weight.T


@dataclass(frozen=True)
class FakeQuantCache:
    """How one layer keeps K and V: ``layout`` None = unquantized, ``rotation`` = U_C float32 [hd, hd] or None."""

    layout: KVLayout | None
    rotation: torch.Tensor | None = None


def attach_cache(attention: nn.Module, cache: FakeQuantCache) -> None:
    """Tell the attention function how the layer of ``attention`` keeps K and V."""
    setattr(attention, _CACHE_ATTRIBUTE, cache)


def fake_quant_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention over K and V as the packed cache returns them, in float32.

    query [B, H, T, hd], key and value [B, Hkv, S, hd] after RoPE, S >= T with the queries last. transformers builds no
    mask for a custom attention function; padding must be on the right.

    Returns [B, T, H, hd] in query's dtype.
    """
    cache: FakeQuantCache = getattr(module, _CACHE_ATTRIBUTE)
    q, k, v = query.float(), key.float(), value.float()
    if cache.layout is not None:
        if cache.rotation is not None:
            rotation = cache.rotation.to(q.device)
            q, k = q @ rotation, k @ rotation
        k, v = kv_fake_quantize(k, cache.layout), kv_fake_quantize(v, cache.layout)
    mask = _causal_mask(q.shape[2], k.shape[2], sliding_window, q.device)
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling)
    return out.transpose(1, 2).contiguous().to(query.dtype), None


def _causal_mask(queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """True where a query sees a key, bool [queries, keys]; None for the plain triangle, which needs no mask."""
    if queries == keys and (window is None or window >= keys):
        return None
    position = torch.arange(keys - queries, keys, device=device)[:, None]
    past = torch.arange(keys, device=device)[None, :]
    visible = past <= position
    return visible if window is None else visible & (past > position - window)


def register_attention() -> str:
    """Register the attention function with transformers (again is harmless) and return its name."""
    AttentionInterface.register(ATTENTION_NAME, fake_quant_attention)
    return ATTENTION_NAME
