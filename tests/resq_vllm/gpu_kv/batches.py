"""Random paged batches for the checks of the GPU cache kernels, and the errors they are held to."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from resq_vllm import reference
from resq_vllm.formats.kv_layout import KVLayout

# Where the kernels run: the interpreter's tensors are on the CPU.
DEVICE = os.environ.get("RESQ_TEST_DEVICE", "cpu")
# Processors of a small imaginary GPU: contexts are split over a few programs already.
SMS = 4


@dataclass(frozen=True)
class Shape:
    """One layer's cache and heads."""

    head_dim: int
    high: int
    low_bits: int
    group: int
    kv_heads: int
    block: int

    @property
    def layout(self) -> KVLayout:
        return KVLayout(self.head_dim, self.high, self.low_bits)

    @property
    def heads(self) -> int:
        return self.group * self.kv_heads


@dataclass(frozen=True)
class Sequence:
    """tokens: in the cache, the new ones included; queries: new ones."""

    tokens: int
    queries: int


@dataclass(frozen=True)
class Batch:
    cache: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor
    rotation: torch.Tensor
    query: torch.Tensor


def rotation(head_dim: int, generator: torch.Generator) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(head_dim, head_dim, generator=generator))[0].contiguous()


def fused(tokens: int, shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """q, k, v [tokens, heads, head_dim] as strided views into one fused qkv output."""
    heads = (shape.heads, shape.kv_heads, shape.kv_heads)
    qkv = torch.randn(tokens, sum(heads) * shape.head_dim, generator=generator).to(dtype)
    parts = qkv.split([n * shape.head_dim for n in heads], dim=1)
    return tuple(part.unflatten(1, (n, shape.head_dim)) for part, n in zip(parts, heads, strict=True))


def batch(shape: Shape, sequences: list[Sequence], dtype: torch.dtype, seed: int = 0, padding: int = 3) -> Batch:
    """Caches filled by the reference on scattered pages; what lies behind a sequence's end is NaN or the worst codes.

    padding: query rows that no sequence covers.
    """
    g = torch.Generator().manual_seed(seed)
    pages = [-(-s.tokens // shape.block) for s in sequences]
    order = torch.randperm(sum(pages) + 2, generator=g)
    table = torch.full((len(sequences), max([*pages, 1]) + 1), 10**6, dtype=torch.int32)
    slots, used = [], 0
    for row, (sequence, count) in enumerate(zip(sequences, pages, strict=True)):
        table[row, :count] = order[used : used + count]
        used += count
        position = torch.arange(sequence.tokens)
        slots.append(table[row].long()[position // shape.block] * shape.block + position % shape.block)
    cache = torch.full((len(order), shape.kv_heads, shape.block, shape.layout.bytes_per_token), 255, dtype=torch.uint8)
    turn = rotation(shape.head_dim, g)
    _, key, value = fused(sum(s.tokens for s in sequences), shape, dtype, g)
    reference.kv_write(key, value, cache, torch.cat(slots), turn, shape.layout)
    starts = torch.tensor([0, *(s.queries for s in sequences)]).cumsum(0).to(torch.int32)
    query, _, _ = fused(int(starts[-1]) + padding, shape, dtype, g)
    lengths = torch.tensor([s.tokens for s in sequences], dtype=torch.int32)
    return Batch(cache, table, lengths, starts, turn, query)


def errors(made: Batch, shape: Shape, output: torch.Tensor, window: int) -> tuple[float, float]:
    """Largest error of ``output``, and of torch in bf16, both against float64: the kernels' products are bf16."""
    exact, rounded = (
        reference.attention(
            made.query,
            made.cache,
            made.block_table,
            made.seq_lens,
            made.query_start_loc,
            made.rotation,
            shape.head_dim**-0.5,
            shape.layout,
            window,
            dtype,
        ).double()
        for dtype in (torch.float64, torch.bfloat16)
    )
    end = int(made.query_start_loc[-1])
    return float((output.double() - exact)[:end].abs().max()), float((rounded - exact)[:end].abs().max())
