"""Contenders of the GPU attention benchmark: one batch over each one's own cache, on pages enough to keep L2 cold.

All caches hold the same number of tokens in pages of 64; every call has a block table of its own over one pool.
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
class Batch:
    """Tensors of a case on the GPU: query, lengths, and as many block tables as copies fit the pool."""

    query: torch.Tensor
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
    every = torch.tensor(order, dtype=torch.int32, device="cuda").view(copies, case.sequences, pages)
    return Batch(
        torch.randn(case.sequences * case.queries, heads.query, heads.dim, device="cuda", dtype=torch.bfloat16),
        torch.full((case.sequences,), case.context, dtype=torch.int32, device="cuda"),
        torch.arange(case.sequences + 1, dtype=torch.int32, device="cuda") * case.queries,
        list(every.unbind(0)),
        blocks,
    )


def resq(case: Case, heads: Heads, low_bits: int) -> list[Call]:
    """Ours, the query's rotation included, over random codes with sane scales."""
    from resq_vllm.gpu_kv import attention, kv_write, workspace_bytes

    layout = KVLayout(heads.dim, heads.dim // 8, low_bits)
    made = batch(case, heads, layout.bytes_per_token)
    cache = torch.zeros(made.blocks, heads.kv, BLOCK, layout.bytes_per_token, dtype=torch.uint8, device="cuda")
    rotation = torch.linalg.qr(torch.randn(heads.dim, heads.dim))[0].contiguous().cuda()
    for start in range(0, made.blocks * BLOCK, 1 << 16):
        slots = torch.arange(start, min(start + (1 << 16), made.blocks * BLOCK), device="cuda")
        key = torch.randn(len(slots), heads.kv, heads.dim, device="cuda", dtype=torch.bfloat16)
        kv_write(key, key.flip(0), cache, slots, rotation, layout.high, low_bits)
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    size = workspace_bytes(case.sequences, heads.query, heads.kv, heads.dim, sms)
    workspace, output = torch.empty(size, dtype=torch.uint8, device="cuda"), torch.empty_like(made.query)

    def call(table: torch.Tensor) -> None:
        attention(
            made.query,
            cache,
            output,
            table,
            made.seq_lens,
            made.query_start_loc,
            rotation,
            heads.dim**-0.5,
            layout.high,
            low_bits,
            -1,
            case.queries,
            case.context,
            workspace,
            num_sms=sms,
        )

    return [partial(call, table) for table in made.tables]


def flash(case: Case, heads: Heads, fp8: bool) -> list[Call]:
    """vLLM's FlashAttention of the version that it chooses for this GPU, over a bf16 or fp8 cache."""
    try:
        from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
        from vllm.vllm_flash_attn import flash_attn_varlen_func
    except ImportError as error:
        raise UnavailableError(f"vLLM's FlashAttention cannot be imported ({error})") from error
    version = get_flash_attn_version(head_size=heads.dim)
    if fp8 and version != 3:
        raise UnavailableError(f"an fp8 cache needs FlashAttention 3, and vLLM chose version {version} here")
    made = batch(case, heads, heads.dim * (2 if fp8 else 4))
    shape = (made.blocks, BLOCK, heads.kv, heads.dim)
    keys, values = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    query, output = made.query, torch.empty_like(made.query)
    extra: dict[str, Any] = {}
    if fp8:
        query, keys, values = (x.to(torch.float8_e4m3fn) for x in (query, keys, values))
        one = torch.ones(case.sequences, heads.kv, device="cuda")
        extra = {"q_descale": one, "k_descale": one, "v_descale": one}

    def call(table: torch.Tensor) -> None:
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

    return [partial(call, table) for table in made.tables]


@dataclass(frozen=True)
class Contender:
    """bytes_per_token: of keys and values of one kv head; calls: one for every block table."""

    bytes_per_token: Callable[[Heads], int]
    calls: Callable[[Case, Heads], list[Call]]


def contenders() -> dict[str, Contender]:
    return {
        "bf16": Contender(lambda heads: 4 * heads.dim, lambda case, heads: flash(case, heads, fp8=False)),
        "fp8": Contender(lambda heads: 2 * heads.dim, lambda case, heads: flash(case, heads, fp8=True)),
        "resq": Contender(
            lambda heads: KVLayout(heads.dim, heads.dim // 8).bytes_per_token,
            lambda case, heads: resq(case, heads, 4),
        ),
        "resq-8bit": Contender(
            lambda heads: KVLayout(heads.dim, heads.dim // 8, 8).bytes_per_token,
            lambda case, heads: resq(case, heads, 8),
        ),
    }
