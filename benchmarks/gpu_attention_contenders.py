"""Contenders of the GPU attention benchmark: one batch over each one's own cache, on pages enough to keep L2 cold.

All caches hold the same number of tokens in pages of 64; every call has a block table of its own over one pool. A layer
is what vLLM launches between RoPE and o_proj: the write of the new tokens, what the query needs, and attention.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from resq_vllm.formats.kv_layout import KVLayout

BLOCK = 64
# Pages of one contender's pool together: several times the L2 cache of an H200 (50 MB).
POOL_BYTES = 256 << 20
DEVICE = "cuda"
# vLLM's bound for decodes in CUDA graphs (AttentionConfig.flash_attn_max_num_splits_for_cuda_graph); 0: no bound.
GRAPH_SPLITS = 32
Call = Callable[[], object]


class UnavailableError(Exception):
    """A contender cannot be measured here; the message says why."""


@dataclass(frozen=True)
class Heads:
    """The attention of one layer."""

    name: str
    query: int
    kv: int
    dim: int


LLAMA_8B = Heads("8B", 32, 8, 128)
LLAMA_1B = Heads("1B", 32, 8, 64)


@dataclass(frozen=True)
class Case:
    """A batch of sequences alike: ``context`` tokens in the cache, the last ``queries`` of them new."""

    phase: str
    sequences: int
    context: int
    queries: int

    def kv_bytes(self, bytes_per_token: int, heads: Heads) -> int:
        """Of keys and values that one call reads once."""
        return self.sequences * self.context * heads.kv * bytes_per_token

    def work(self, heads: Heads) -> float:
        """Multiply-adds·2 of the scores that a causal mask leaves, and as many of the values."""
        seen = self.queries * (2 * self.context - self.queries + 1) / 2
        return 4.0 * self.sequences * heads.query * heads.dim * seen


@dataclass(frozen=True)
class Calls:
    """Of every block table a call: the whole layer, and its attention alone."""

    layer: list[Call]
    attention: list[Call]


@dataclass(frozen=True)
class Batch:
    """Tensors of a case on the GPU: new tokens, lengths, and as many block tables as copies fit the pool."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor
    tables: list[torch.Tensor]
    blocks: int


def batch(case: Case, heads: Heads, bytes_per_token: int) -> Batch:
    pages = -(-case.context // BLOCK)
    copies = max(1, -(-POOL_BYTES // case.kv_bytes(bytes_per_token, heads)))
    blocks = copies * case.sequences * pages
    order = list(range(blocks))
    random.Random(0).shuffle(order)
    every = torch.tensor(order, dtype=torch.int32, device=DEVICE).view(copies, case.sequences, pages)
    tokens = case.sequences * case.queries
    query, key, value = (
        torch.randn(tokens, heads_of, heads.dim, device=DEVICE, dtype=torch.bfloat16)
        for heads_of in (heads.query, heads.kv, heads.kv)
    )
    return Batch(
        query,
        key,
        value,
        torch.full((case.sequences,), case.context, dtype=torch.int32, device=DEVICE),
        torch.arange(case.sequences + 1, dtype=torch.int32, device=DEVICE) * case.queries,
        list(every.unbind(0)),
        blocks,
    )


def slots(case: Case, table: torch.Tensor) -> torch.Tensor:
    """Slot mapping of the new tokens, the last of every sequence: int64 [sequences · queries]."""
    position = torch.arange(case.context - case.queries, case.context, device=table.device)
    return (table.long()[:, position // BLOCK] * BLOCK + position % BLOCK).flatten()


def processors() -> int:
    return int(torch.cuda.get_device_properties(0).multi_processor_count)


def resq(case: Case, heads: Heads, low_bits: int, cuda_kernel: bool = True) -> Calls:
    """Ours, as resq_vllm.attention_kernels calls it, over random codes with sane scales.

    cuda_kernel: False makes Triton's kernel decode.
    """
    from resq_vllm.gpu_kv import attention, kv_write, workspace_bytes, write_and_rotate

    layout = KVLayout(heads.dim, heads.dim // 8, low_bits)
    made = batch(case, heads, layout.bytes_per_token)
    cache = torch.zeros(made.blocks, heads.kv, BLOCK, layout.bytes_per_token, dtype=torch.uint8, device=DEVICE)
    rotation = torch.linalg.qr(torch.randn(heads.dim, heads.dim))[0].contiguous().to(DEVICE)
    for start in range(0, made.blocks * BLOCK, 1 << 16):
        filled = torch.arange(start, min(start + (1 << 16), made.blocks * BLOCK), device=DEVICE)
        key = torch.randn(len(filled), heads.kv, heads.dim, device=DEVICE, dtype=torch.bfloat16)
        kv_write(key, key.flip(0), cache, filled, rotation, layout.high, low_bits)
    sms = processors()
    size = workspace_bytes(case.sequences, heads.query, heads.kv, heads.dim, sms)
    workspace, output = torch.empty(size, dtype=torch.uint8, device=DEVICE), torch.empty_like(made.query)

    def attend(turned: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        attention(
            turned,
            cache,
            output,
            table,
            made.seq_lens,
            made.query_start_loc,
            None,
            heads.dim**-0.5,
            layout.high,
            low_bits,
            -1,
            case.queries,
            case.context,
            workspace,
            num_sms=sms,
            cuda_kernel=cuda_kernel,
        )
        return output

    def layer(table: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        to_write = made.query, made.key, made.value, cache, output, where, made.query_start_loc
        write_and_rotate(*to_write, rotation, layout.high, low_bits)
        return attend(output, table)

    return Calls(
        [partial(layer, table, slots(case, table)) for table in made.tables],
        [partial(attend, made.query, table) for table in made.tables],
    )


def flash(case: Case, heads: Heads, fp8: bool) -> Calls:
    """vLLM's FlashAttention of the version that it chooses for this GPU, over a bf16 or fp8 cache.

    Version 3's schedule is computed once, as vLLM does for all layers of a step. An fp8 cache takes an fp8 query, whose
    quantization is part of the layer.
    """
    try:
        from vllm._custom_ops import reshape_and_cache_flash, scaled_fp8_quant
        from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
        from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata
    except ImportError as error:
        raise UnavailableError(f"vLLM's FlashAttention cannot be imported ({error})") from error
    version = get_flash_attn_version(head_size=heads.dim)
    if fp8 and version != 3:
        raise UnavailableError(f"an fp8 cache needs FlashAttention 3, and vLLM chose version {version} here")
    made = batch(case, heads, heads.dim * (2 if fp8 else 4))
    shape = (made.blocks, BLOCK, heads.kv, heads.dim)
    dtype, cache_dtype = (torch.float8_e4m3fn, "fp8") if fp8 else (torch.bfloat16, "auto")
    keys, values = (torch.randn(shape, device=DEVICE, dtype=torch.bfloat16).to(dtype) for _ in range(2))
    # The write takes an fp8 cache as bytes.
    stored = [x.view(torch.uint8) if fp8 else x for x in (keys, values)]
    query, output = made.query.to(dtype), torch.empty_like(made.query)
    one = torch.ones(1, device=DEVICE)
    scales = one.expand(case.sequences, heads.kv)
    extra: dict[str, Any] = {"q_descale": scales, "k_descale": scales, "v_descale": scales} if fp8 else {}
    if version == 3:
        # Prompts are not in a full graph.
        extra["num_splits"] = GRAPH_SPLITS if case.queries == 1 else 0
        extra["scheduler_metadata"] = get_scheduler_metadata(
            batch_size=case.sequences,
            max_seqlen_q=case.queries,
            max_seqlen_k=case.context,
            num_heads_q=heads.query,
            num_heads_kv=heads.kv,
            headdim=heads.dim,
            cache_seqlens=made.seq_lens,
            qkv_dtype=dtype,
            cu_seqlens_q=made.query_start_loc,
            page_size=BLOCK,
            causal=True,
            num_splits=extra["num_splits"],
        )

    def attend(table: torch.Tensor) -> torch.Tensor:
        flash_attn_varlen_func(
            q=query,
            k=keys,
            v=values,
            out=output,
            cu_seqlens_q=made.query_start_loc,
            max_seqlen_q=case.queries,
            seqused_k=made.seq_lens,
            max_seqlen_k=case.context,
            softmax_scale=heads.dim**-0.5,
            causal=True,
            block_table=table,
            fa_version=version,
            **extra,
        )
        return output

    def layer(table: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        reshape_and_cache_flash(made.key, made.value, *stored, where, cache_dtype, one, one)
        if fp8:
            scaled_fp8_quant(made.query.flatten(1), one, output=query.flatten(1))
        return attend(table)

    return Calls(
        [partial(layer, table, slots(case, table)) for table in made.tables],
        [partial(attend, table) for table in made.tables],
    )


@dataclass(frozen=True)
class Contender:
    """bytes_per_token: of keys and values of one kv head."""

    bytes_per_token: Callable[[Heads], int]
    calls: Callable[[Case, Heads], Calls]


def contenders() -> dict[str, Contender]:
    return {
        "bf16": Contender(lambda heads: 4 * heads.dim, lambda case, heads: flash(case, heads, fp8=False)),
        "fp8": Contender(lambda heads: 2 * heads.dim, lambda case, heads: flash(case, heads, fp8=True)),
        "resq": Contender(
            lambda heads: KVLayout(heads.dim, heads.dim // 8).bytes_per_token,
            lambda case, heads: resq(case, heads, 4),
        ),
        "resq-triton": Contender(
            lambda heads: KVLayout(heads.dim, heads.dim // 8).bytes_per_token,
            lambda case, heads: resq(case, heads, 4, cuda_kernel=False),
        ),
        "resq-8bit": Contender(
            lambda heads: KVLayout(heads.dim, heads.dim // 8, 8).bytes_per_token,
            lambda case, heads: resq(case, heads, 8),
        ),
    }
