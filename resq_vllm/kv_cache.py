"""``ResQKVCacheMethod``: gives an attention layer the packed cache, its backend and its key rotation U_C."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from resq_vllm.attention import ResQAttentionImpl, packed_backend
from resq_vllm.attention_kernels import Heads, kernels
from resq_vllm.errors import ResQError
from resq_vllm.formats.kv_layout import HIGH_BITS, KVLayout
from resq_vllm.log import log_once
from resq_vllm.vllm_api import (
    Attention,
    AttentionBackendEnum,
    AttentionType,
    BaseKVCacheMethod,
    VllmConfig,
    get_current_vllm_config,
    set_weight_attrs,
)

if TYPE_CHECKING:
    from resq_vllm.config import ResQConfig

# U_C·U_Cᵀ may differ from I by this much (float32 products of a float64-made matrix stay below 1e-5).
ORTHOGONALITY_TOLERANCE = 1e-3


def opt_out_reason(layer: Attention, index: int) -> str | None:
    """Why the user wants layer ``index`` in vLLM's own cache, or None when the checkpoint's packing applies.

    "auto" means "as the checkpoint says"; every explicit --kv-cache-dtype opts out, and so do skipped layers.
    """
    cache = get_current_vllm_config().cache_config
    if cache.cache_dtype != "auto":
        return f"--kv-cache-dtype is {cache.cache_dtype}"
    skipped = cache.kv_cache_dtype_skip_layers
    if str(index) in skipped or ("sliding_window" in skipped and getattr(layer, "sliding_window", None) is not None):
        return f"--kv-cache-dtype-skip-layers names layer {index}"
    return None


class ResQKVCacheMethod(BaseKVCacheMethod):
    """Replaces ``attn_backend`` and ``impl`` of an Attention layer and registers ``key_rotation`` float32 [hd, hd].

    The rotation loads from ``….self_attn.attn.key_rotation`` and is shared by all heads of the layer and all ranks.
    """

    def __init__(self, config: ResQConfig, layout: KVLayout) -> None:
        super().__init__(config)
        self.layout = layout
        # vLLM makes the served dtype torch's default while it builds layers.
        self._dtype = torch.get_default_dtype()

    def create_weights(self, layer: Attention) -> None:
        """Called by vLLM at the end of ``Attention.__init__``.

        Raises ResQError when the layer asks for something that the packed cache cannot do.
        """
        config = get_current_vllm_config()
        reasons = unsupported(layer, self.layout) + unsupported_settings(config)
        if reasons:
            raise ResQError(
                f"{layer.layer_name}: the packed KV cache does not support {', '.join(reasons)}; "
                "serve with an explicit --kv-cache-dtype (such as bfloat16) to use vLLM's own cache"
            )
        old, backend = layer.impl, packed_backend(self.layout)
        layer.attn_backend = backend
        layer.backend = AttentionBackendEnum.CUSTOM
        layer.impl = backend.get_impl_cls()(
            layer.num_heads,
            layer.head_size,
            old.scale,
            layer.num_kv_heads,
            None,
            layer.sliding_window,
            layer.kv_cache_dtype,
        )
        unset = torch.full((layer.head_size, layer.head_size), torch.nan, dtype=torch.float32)
        rotation = torch.nn.Parameter(unset, requires_grad=False)
        set_weight_attrs(rotation, {"weight_loader": _RotationLoader(layer.layer_name)})
        layer.register_parameter("key_rotation", rotation)
        layer.resq_dummy = config.load_config.load_format == "dummy"
        self._max_seqs = config.scheduler_config.max_num_seqs

    def process_weights_after_loading(self, layer: Attention) -> None:
        """Check the rotation that was loaded, and that the layer still runs on the packed cache."""
        require_packed(layer)
        rotation = layer.key_rotation.data
        if layer.resq_dummy:
            rotation.copy_(torch.eye(rotation.shape[0]))
        if torch.isnan(rotation).any():
            raise ResQError(f"the checkpoint lacks {layer.layer_name}.key_rotation; quantize the model again")
        error = (rotation @ rotation.T - torch.eye(rotation.shape[0], device=rotation.device)).abs().max().item()
        if error > ORTHOGONALITY_TOLERANCE:
            raise ResQError(
                f"{layer.layer_name}.key_rotation is not orthogonal (off by {error:.1e}); quantize the model again"
            )
        kernels().reserve(rotation.device, layer.impl.heads, self._max_seqs)
        log_once(logging.INFO, f"ResQ: attention: {kernels().describe(self._dtype, self.layout)}")


class _RotationLoader:
    """Weight loader of ``key_rotation``: the whole matrix on every rank."""

    def __init__(self, layer_name: str) -> None:
        self._layer_name = layer_name

    def __call__(self, param: torch.nn.Parameter, loaded_weight: torch.Tensor) -> None:
        if loaded_weight.shape != param.shape:
            raise ResQError(
                f"{self._layer_name}.key_rotation has shape {tuple(loaded_weight.shape)} in the checkpoint instead of "
                f"{tuple(param.shape)}; quantize the model again"
            )
        param.data.copy_(loaded_weight)


def unsupported(layer: Attention, layout: KVLayout) -> list[str]:
    """What of ``layer`` the packed cache cannot do, in words (the swap bypasses vLLM's own validation)."""
    if type(layer) is not Attention:
        return [f"layers of type {type(layer).__name__}"]
    impl = layer.impl
    checks = [
        (layer.attn_type != AttentionType.DECODER, f"{getattr(layer.attn_type, 'value', layer.attn_type)} attention"),
        (layer.head_size != layout.head_dim, f"heads of {layer.head_size} dims (it was made for {layout.head_dim})"),
        (layer.head_size_v != layer.head_size, f"value heads of {layer.head_size_v} dims"),
        (getattr(impl, "alibi_slopes", None) is not None, "ALiBi"),
        (bool(getattr(impl, "logits_soft_cap", None)), "a logits soft cap"),
        (layer.has_sink, "attention sinks"),
        (layer.kv_sharing_target_layer_name is not None, "KV sharing between layers"),
        (layer.use_mm_prefix, "bidirectional multimodal prefixes"),
    ]
    found = [reason for failed, reason in checks if failed]
    lacking = None if found else kernels().problem(Heads(layer.num_heads, layer.num_kv_heads, layout))
    return [*found, lacking] if lacking else found


def unsupported_settings(config: VllmConfig) -> list[str]:
    """What of the engine's settings the packed cache cannot do, in words."""
    parallel, model = config.parallel_config, config.model_config
    checks = [
        (parallel.decode_context_parallel_size > 1, "decode context parallelism"),
        (parallel.prefill_context_parallel_size > 1, "prefill context parallelism"),
        (model is not None and model.rswa_window is not None, "reference sliding-window attention"),
    ]
    return [reason for failed, reason in checks if failed]


def require_packed(layer: Attention) -> None:
    """Raise ResQError when something replaced the packed cache's impl or backend after the layer was made."""
    if not isinstance(layer.impl, ResQAttentionImpl) or layer.get_attn_backend().get_impl_cls() is not type(layer.impl):
        raise ResQError(
            f"{layer.layer_name}: {type(layer.impl).__name__} took the place of the packed KV cache's attention; serve "
            "with an explicit --kv-cache-dtype (such as bfloat16) or without what replaces attention layers"
        )


def describe(config: ResQConfig) -> str:
    """The KV cache in words for the start-up line: bits, bytes per token and head, bytes per token on this rank."""
    packed = [d for d in config.kv_layers.values() if d.layout is not None]
    if not packed:
        return "KV cache in 16 bits or as --kv-cache-dtype says"
    plain = 4 * config.metadata.head_dim
    layouts = sorted({d.layout for d in packed if d.layout}, key=lambda layout: layout.bytes_per_token)
    kinds = ", ".join(f"{_bits(layout)}-bit {layout.bytes_per_token} bytes per token and head" for layout in layouts)
    total = sum(d.kv_heads * d.bytes_per_token for d in config.kv_layers.values())
    bf16 = sum(d.kv_heads * plain for d in config.kv_layers.values())
    return (
        f"KV cache {kinds} (bf16: {plain}), packed in {len(packed)} of {len(config.kv_layers)} layers, "
        f"{total} bytes per token on this rank (bf16: {bf16}, {bf16 / total:.2f} times as much)"
    )


def _bits(layout: KVLayout) -> str:
    return f"{layout.low_bits}/{HIGH_BITS}" if layout.high else str(layout.low_bits)
