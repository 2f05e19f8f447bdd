"""Prefill and mixed batches: causal blocked attention straight over the packed pages, the numbers that decode sees.

A program takes a block of one sequence's query tokens with all query heads of a kv head. Blocks of all sequences are
numbered so that a program finds its sequence from query_start_loc alone, wherever in a batch that begins; those past
a sequence's end leave at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from resq_vllm.gpu_kv.arithmetic import store_rounded
from resq_vllm.gpu_kv.blocks import attend_block, load_query_block, start_block, store_block
from resq_vllm.gpu_kv.page import Page
from resq_vllm.gpu_kv.schedule import prefill_tile


@triton.jit
def _sequence_of(block, query_start_loc, sequences, QUERIES: tl.constexpr):
    """The last sequence s whose first block, query_start_loc[s] // QUERIES + s, is not after ``block``.

    ``block`` counts from query_start_loc[0] // QUERIES.
    """
    low, high = 0, sequences
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(query_start_loc + middle) // QUERIES + middle <= block:
            low = middle
        else:
            high = middle
    return low


@triton.jit(
    do_not_specialize=["window", "sequences", "table_row"],
    do_not_specialize_on_alignment=["block_table", "seq_lens", "query_start_loc"],
)
def _prefill(
    query,  # rotated
    cache,
    output,
    block_table,
    seq_lens,
    query_start_loc,
    sequences,
    scale,
    window,
    query_token,
    query_head,
    output_token,
    output_head,
    cache_block,
    cache_head,
    table_row,
    P: tl.constexpr,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    head = tl.program_id(0)
    # The last blocks of a prompt have the longest contexts: they start first.
    block = tl.num_programs(1) - 1 - tl.program_id(1) + tl.load(query_start_loc) // QUERIES
    sequence = _sequence_of(block, query_start_loc, sequences, QUERIES)
    first = tl.load(query_start_loc + sequence)
    queries = tl.load(query_start_loc + sequence + 1) - first
    start = (block - (first // QUERIES + sequence)) * QUERIES
    length = tl.load(seq_lens + sequence)
    if (start < queries) & (length > 0):
        row = tl.arange(0, M)
        index = start + row // GROUP
        valid = (row < QUERIES * GROUP) & (index < queries)
        query_row = (first + index).to(tl.int64)
        query_heads = head * GROUP + row % GROUP
        q = load_query_block(
            query + (query_row * query_token + query_heads * query_head)[:, None], valid[:, None], scale, P
        )
        past = length - queries + start  # tokens before this block's first query
        position = past + row // GROUP
        last = tl.minimum(past + QUERIES, length)
        state = start_block(M, P)
        pages = cache + head.to(tl.int64) * cache_head
        table = block_table + sequence.to(tl.int64) * table_row
        begin = 0
        end = tl.cdiv(last, N)
        if WINDOWED:
            begin = tl.maximum(past - window + 1, 0) // N
        else:
            # The tiles that every row sees whole need no mask.
            full = (past + 1) // N
            for tile in range(full):
                state = attend_block(
                    q,
                    state,
                    pages,
                    cache_block,
                    table,
                    tile * N,
                    length,
                    position,
                    window,
                    P,
                    N,
                    False,
                    False,
                )
            begin = full
        for tile in range(begin, end):
            state = attend_block(
                q, state, pages, cache_block, table, tile * N, length, position, window, P, N, True, WINDOWED
            )
        _, total, sums = state
        factor = tl.where(total > 0.0, 1.0 / total, 0.0)[:, None]
        place = output + (query_row * output_token + query_heads * output_head)[:, None]
        store_block(place, sums, factor, valid[:, None], P, store_rounded)


def prefill(
    query: torch.Tensor,
    cache: torch.Tensor,
    output: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    scale: float,
    window: int,
    page: Page,
) -> None:
    """Launch on checked arguments. scale: times log2 e."""
    sequences, kv_heads = seq_lens.shape[0], cache.shape[1]
    group = query.shape[1] // kv_heads
    tile = prefill_tile(page.head_dim)
    queries = max(1, tile.rows // group)
    _prefill[(kv_heads, query.shape[0] // queries + sequences)](
        query,
        cache,
        output,
        block_table,
        seq_lens,
        query_start_loc,
        sequences,
        scale,
        window,
        query.stride(0),
        query.stride(1),
        output.stride(0),
        output.stride(1),
        cache.stride(0),
        cache.stride(1),
        block_table.stride(0),
        P=page,
        GROUP=group,
        QUERIES=queries,
        M=tile.rows,
        WINDOWED=window > 0,
        N=tile.tokens,
        num_warps=tile.warps,
        enable_fp_fusion=True,  # Triton 3.10 no longer does so by itself
        num_stages=tile.stages,
    )
