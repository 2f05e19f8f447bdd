"""One attention function, registered with transformers, that lets us see and replace q, k and v after RoPE.

transformers looks attention up by name for every model, so its modelling code runs as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

ATTENTION_NAME = "resq_observed_sdpa"

# (query [B, h, T, hd], key [B, kv, T, hd], value [B, kv, T, hd]) -> the three to attend with, same shapes
AttentionHook = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]

_hooks: WeakKeyDictionary[nn.Module, AttentionHook] = WeakKeyDictionary()


def _observed_sdpa(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    hook = _hooks.get(module)
    if hook is not None:
        query, key, value = hook(query, key, value)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(ATTENTION_NAME, _observed_sdpa)
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)


def set_attention_hook(module: nn.Module, hook: AttentionHook | None) -> None:
    """Give an attention module a hook, or take it away with None.

    The module's config must have ``_attn_implementation = ATTENTION_NAME`` (``LayerRunner`` sees to that; a whole
    transformers model takes it as ``attn_implementation`` of ``from_pretrained``).
    """
    if hook is None:
        _hooks.pop(module, None)
    else:
        _hooks[module] = hook
