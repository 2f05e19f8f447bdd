"""Attention over the packed KV cache: backend, metadata, builder and impl, for vLLM's V1 and V2 runners.

One backend class per page layout, since vLLM asks the class (not the layer) how large a page is. K is rotated by U_C,
quantized and packed at the begin of ``forward``, which attends every query token over the packed pages, its own
token's included, so prefill, chunked prefill, prefix-cache hits and decode agree.
The kernels are those of the platform (resq_vllm.attention_kernels).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from resq_vllm.attention_kernels import Heads, Part, kernels
from resq_vllm.errors import ResQError
from resq_vllm.formats.kv_layout import TOKENS_PER_TILE, KVLayout
from resq_vllm.vllm_api import (
    Attention,
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionSpec,
    AttentionType,
    CommonAttentionMetadata,
    KVCacheLayout,
    MultipleOf,
    VllmConfig,
    get_layers_from_vllm_config,
)

if TYPE_CHECKING:
    from resq_vllm.decoder_stack import DecoderStack


class ResQAttentionBackend(AttentionBackend):
    """Base of the per-layout backends; ``layout`` is set by :func:`packed_backend`."""

    layout: ClassVar[KVLayout]
    # Keys and values are packed in forward: on CPUs an op less a layer, on GPUs a launch less.
    forward_includes_kv_cache_update = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.bfloat16, torch.float16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto"]

    @staticmethod
    def get_name() -> str:
        return "RESQ"

    @staticmethod
    def get_builder_cls() -> type[ResQMetadataBuilder]:
        return ResQMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        return [MultipleOf(TOKENS_PER_TILE)]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """Tokens a page where --block-size says none and every layer is packed; vLLM asks on GPUs alone."""
        return kernels().preferred_block_size or default_block_size

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[Any, ...]:
        # Layer, block, head, token, content: the N·C bytes of one head's page are contiguous, free for planes inside.
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type == AttentionType.DECODER

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return head_size == cls.layout.head_dim

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """The page: C bytes per token and kv head, K and V together."""
        return replace(spec, dtype=torch.uint8, state_content_bytes=cls.layout.bytes_per_token)


@cache
def packed_backend(layout: KVLayout) -> type[ResQAttentionBackend]:
    """The backend class for pages of ``layout``: one per layout, named for it, as vLLM groups layers by class name."""
    impl_name, name = (f"{kind}_{layout.head_dim}_{layout.high}_{layout.low_bits}" for kind in ("Impl", "Backend"))
    impl = type(f"ResQAttention{impl_name}", (ResQAttentionImpl,), {"layout": layout})
    body = {
        "layout": layout,
        "get_impl_cls": staticmethod(lambda: impl),
    }
    return type(f"ResQAttention{name}", (ResQAttentionBackend,), body)


@dataclass
class ResQMetadata(AttentionMetadata):
    """One batch, as the ops take it: S sequences, T tokens.

    Attributes:
        tokens: T, without padding.
        query_start_loc: int32 [S+1].
        seq_lens: int32 [S], the new tokens included.
        block_table: int32 [S, blocks].
        slot_mapping: int64 [T], −1 = skip.
        parts: launches that make up the batch (GPUs alone).
        max_seq_len: the longest of seq_lens or more, as the host knows it (GPUs alone).

    """

    tokens: int
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    slot_mapping: torch.Tensor
    parts: tuple[Part, ...] = ()
    max_seq_len: int = 0


class ResQMetadataBuilder(AttentionMetadataBuilder):
    """Passes on what the runner prepared. On GPUs decodes come first in a batch and have a launch of their own.

    For the capture of CUDA graphs vLLM calls ``build`` as well: with the longest context the model allows and a uniform
    query length, so that a graph fits every batch it is replayed for.
    """

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        require_all_packed(vllm_config)
        self._kernels = kernels()
        if self._kernels.decode_query_len is not None:
            # A speculated token's verification is a decode, too.
            self._init_reorder_batch_threshold(self._kernels.decode_query_len, supports_spec_as_decode=True)
        warm_up_layers(vllm_config, layer_names, kv_cache_spec, device)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: AttentionSpec) -> AttentionCGSupport:
        return kernels().cudagraph_support

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> ResQMetadata:
        """Raises ResQError for a batch that is not causal."""
        common = common_attn_metadata
        if common.causal is not True:
            raise ResQError(
                "the packed KV cache supports causal attention only; serve with an explicit --kv-cache-dtype (such as "
                "bfloat16) to use vLLM's own cache"
            )
        batch = ResQMetadata(
            tokens=common.num_actual_tokens,
            query_start_loc=common.query_start_loc,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
        )
        return self._kernels.plan(batch, common, self.reorder_batch_threshold or 1)


class ResQAttentionImpl(AttentionImpl):
    """Writes and attends by the platform's kernels; the layer's ``key_rotation`` parameter is U_C."""

    layout: ClassVar[KVLayout]

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
    ) -> None:
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        # vLLM's window counts the token itself, as the op's does; −1 = none.
        self.sliding_window = -1 if sliding_window is None else sliding_window
        self.kv_cache_dtype = kv_cache_dtype
        self.heads = Heads(self.num_heads, self.num_kv_heads, self.layout)
        self.kernels = kernels()
        self._known_cache = 0  # address of the cache that has been prepared
        self.stack: DecoderStack | None = None  # of the layers that begin with this one (resq_vllm/decoder.py)

    def prepare(self, kv_cache: torch.Tensor) -> None:
        """Called before a cache is used; what a new one needs is done once."""
        if kv_cache.numel() and kv_cache.data_ptr() != self._known_cache:
            self._known_cache = kv_cache.data_ptr()
            self.kernels.prepare(kv_cache)

    def forward(
        self,
        layer: Attention,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: ResQMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Pack key and value [T, Hkv, hd], then attend for query [T, H, hd] into output [T, H, hd], which is returned.

        Raises ResQError when asked to quantize its output.
        """
        if output_scale is not None or output_block_scale is not None:
            raise ResQError("attention over the packed KV cache cannot quantize its output; disable that fusion pass")
        if attn_metadata is None:
            # vLLM's memory profiling, when no cache is bound yet, and its warm-up.
            self.prepare(kv_cache)
            return output.fill_(0)
        self.prepare(kv_cache)
        of_layer = layer.key_rotation, self.scale, self.heads, self.sliding_window
        self.kernels.forward(query, key, value, kv_cache, output, attn_metadata, *of_layer)
        return output


def warm_up_layers(
    vllm_config: VllmConfig, layer_names: list[str], kv_cache_spec: AttentionSpec, device: torch.device
) -> None:
    """Compile the kernels of these layers, which share a page size, before vLLM captures graphs and serves."""
    model = vllm_config.model_config
    for layer in get_layers_from_vllm_config(vllm_config, Attention, layer_names).values():
        impl: ResQAttentionImpl = layer.impl
        sizes = kv_cache_spec.block_size, impl.sliding_window, model.max_model_len
        impl.kernels.warm_up(device, model.dtype, impl.heads, *sizes)


def require_all_packed(vllm_config: VllmConfig) -> None:
    """Raise ResQError unless every layer that was to have a packed cache still runs on it."""
    from resq_vllm.config import ResQConfig
    from resq_vllm.kv_cache import require_packed

    config = vllm_config.quant_config
    if not isinstance(config, ResQConfig):
        return
    for name, layer in get_layers_from_vllm_config(vllm_config, Attention).items():
        decision = config.kv_layers.get(name)
        if decision is not None and decision.method is not None:
            require_packed(layer)
