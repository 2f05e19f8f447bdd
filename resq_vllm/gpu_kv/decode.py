"""Decode: flash-decoding over the packed pages. A program takes a sequence, a kv head with its whole group of query
heads, and one split of the context; a second kernel merges the splits. For the pages that most models have, the CUDA
kernel of cuda_decode.py takes the first one's place.

On paper, for an H200 (132 processors, 4.8 TB/s: 36 bytes a nanosecond each; not run on a GPU). Per token and kv head C
bytes are read once: 156 at head_dim 128 (bf16: 512), in 16-byte copies of 64 and more contiguous bytes, every sector
whole. A program is one warp: up to 16 query rows fit one warp's tensor-core tile, and more warps would repeat its work.
Seven are resident, with a tile of 64 tokens on its way to each: 70 KB a processor, 2.7 times what hides 0.7 µs. A tile
takes 2500 instructions (72 of them tensor-core products), 625 clocks at 4 a clock against 480 clocks of memory: the
bound is unpacking, at 2.5 times the speed of bf16's bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from resq_vllm.gpu_kv import cuda_decode
from resq_vllm.gpu_kv.arithmetic import store_rounded
from resq_vllm.gpu_kv.page import Page
from resq_vllm.gpu_kv.schedule import TOKENS_PER_SPLIT, decode_tile
from resq_vllm.gpu_kv.tile import attend, load_query, start_state, store_dims

# Not worth a compilation of its own while serving: a slice of a batch begins anywhere.
ANY_ALIGNMENT = ("block_table", "seq_lens", "query_start_loc")


@triton.jit
def _store_float(pointer, x, mask):
    tl.store(pointer, x, mask=mask)


@triton.jit
def _halves(workspace, sequences, of_sequence, DIM: tl.constexpr):
    """Pointers to the partial results and to their log-sums, of which a sequence has ``of_sequence``.

    Bytes, so that a launch without splits, whose workspace may be any tensor of bytes, is the same kernel.
    """
    partial = workspace.to(tl.pointer_type(tl.float32))
    return partial, partial + sequences.to(tl.int64) * of_sequence * DIM


@triton.jit
def _tiles(length, queries, window, splits, N: tl.constexpr, LEAST: tl.constexpr):
    """Of one sequence: first tile that any query sees, one past the last, and tiles per split."""
    begin = 0
    if window > 0:
        begin = tl.maximum(length - queries - window + 1, 0) // N
    end = tl.cdiv(length, N)
    return begin, end, tl.maximum(tl.cdiv(end - begin, splits), LEAST)


@triton.jit(do_not_specialize=["window", "splits", "rows", "table_row"], do_not_specialize_on_alignment=ANY_ALIGNMENT)
def _decode(
    query,  # rotated
    cache,
    output,
    workspace,  # bytes of float32 [S, Hkv, rows, splits, DIM] and [S, Hkv, rows, splits]: of _halves
    block_table,
    seq_lens,
    query_start_loc,
    scale,
    window,
    splits,
    rows,
    query_token,
    query_head,
    output_token,
    output_head,
    cache_block,
    cache_head,
    table_row,
    P: tl.constexpr,
    GROUP: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    LEAST: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    split, head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(seq_lens + sequence)
    first = tl.load(query_start_loc + sequence)
    queries = tl.load(query_start_loc + sequence + 1) - first
    begin, end, step = _tiles(length, queries, window, splits, N, LEAST)
    used = tl.cdiv(end - begin, step)
    if (split < used) & (queries > 0):
        row = tl.arange(0, M)
        valid = row < queries * GROUP
        query_row = (first + row // GROUP).to(tl.int64)
        query_heads = head * GROUP + row % GROUP
        q = load_query(query + (query_row * query_token + query_heads * query_head)[None, :], valid[None, :], P)
        position = length - queries + row // GROUP
        state = start_state(M, P)
        pages = cache + head.to(tl.int64) * cache_head
        table = block_table + sequence.to(tl.int64) * table_row
        begin += split * step
        for tile in range(begin, tl.minimum(begin + step, end)):
            state = attend(
                q, state, pages, cache_block, table, tile * N, length, position, window, scale, P, M, N, True, WINDOWED
            )
        maximum, total, sums = state
        factor = tl.where(total > 0.0, 1.0 / total, 0.0)[None, :]
        if used == 1:
            out_rows = output + (query_row * output_token + query_heads * output_head)[None, :]
            store_dims(out_rows, sums, factor, valid[None, :], P, store_rounded)
        else:
            heads = tl.num_programs(1)
            partial, log_sums = _halves(workspace, tl.num_programs(2), heads * rows * splits, P.head_dim)
            place = ((sequence.to(tl.int64) * heads + head) * rows + row) * splits + split
            store_dims(partial + place[None, :] * P.head_dim, sums, factor, valid[None, :], P, _store_float)
            tl.store(log_sums + place, maximum + tl.log2(total), mask=valid)


@triton.jit(do_not_specialize=["window", "splits", "rows"], do_not_specialize_on_alignment=ANY_ALIGNMENT)
def _merge(
    output,
    workspace,
    seq_lens,
    query_start_loc,
    window,
    splits,
    rows,
    output_token,
    output_head,
    DIM: tl.constexpr,
    DIMS: tl.constexpr,
    GROUP: tl.constexpr,
    N: tl.constexpr,
    LEAST: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row, head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(seq_lens + sequence)
    first = tl.load(query_start_loc + sequence)
    queries = tl.load(query_start_loc + sequence + 1) - first
    begin, end, step = _tiles(length, queries, window, splits, N, LEAST)
    used = tl.cdiv(end - begin, step)
    if (used > 1) & (row < queries * GROUP):
        heads = tl.num_programs(1)
        partial, log_sums = _halves(workspace, tl.num_programs(2), heads * rows * splits, DIM)
        place = ((sequence.to(tl.int64) * heads + head) * rows + row) * splits
        dim = tl.arange(0, DIMS)
        inside = dim < DIM
        maximum = float("-inf")
        total = 0.0
        mixed = tl.zeros((DIMS,), tl.float32)
        for start in range(0, used, CHUNK):
            split = start + tl.arange(0, CHUNK)
            there = split < used
            log_sum = tl.load(log_sums + place + split, mask=there, other=float("-inf"))
            new = tl.maximum(maximum, tl.max(log_sum, 0))
            finite = tl.where(new == float("-inf"), 0.0, new)
            alpha = tl.exp2(maximum - finite)
            weight = tl.exp2(log_sum - finite)
            part = tl.load(
                partial + (place + split)[:, None] * DIM + dim[None, :],
                mask=there[:, None] & inside[None, :],
                other=0.0,
            )
            mixed = mixed * alpha + tl.sum(part * weight[:, None], 0)
            total = total * alpha + tl.sum(weight, 0)
            maximum = new
        place_out = (first + row // GROUP).to(tl.int64) * output_token + (head * GROUP + row % GROUP) * output_head
        store_rounded(output + place_out + dim, mixed / total, inside)


def decode(
    query: torch.Tensor,
    cache: torch.Tensor,
    output: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    scale: float,
    window: int,
    max_query_len: int,
    splits: int,
    workspace: torch.Tensor | None,
    page: Page,
    cuda_kernel: bool,
) -> None:
    """Launch on checked arguments. scale: times log2 e; workspace: of schedule.split_bytes."""
    sequences, kv_heads = seq_lens.shape[0], cache.shape[1]
    group = query.shape[1] // kv_heads
    rows = max_query_len * group
    tile = decode_tile(page.head_dim)
    # Without splits no program touches the workspace.
    scratch = cache if workspace is None else workspace.view(torch.uint8)
    constants = {"GROUP": group, "N": tile.tokens, "LEAST": TOKENS_PER_SPLIT // tile.tokens}
    if cuda_kernel:
        batch = query, cache, output, block_table, seq_lens, query_start_loc
        cuda_decode.launch(*batch, scale, window, max_query_len, splits, workspace, page)
    else:
        _decode[(splits, kv_heads, sequences)](
            query,
            cache,
            output,
            scratch,
            block_table,
            seq_lens,
            query_start_loc,
            scale,
            window,
            splits,
            rows,
            query.stride(0),
            query.stride(1),
            output.stride(0),
            output.stride(1),
            cache.stride(0),
            cache.stride(1),
            block_table.stride(0),
            P=page,
            M=8 if rows <= 8 else 16,
            WINDOWED=window > 0,
            num_warps=tile.warps,
            enable_fp_fusion=True,  # Triton 3.10 no longer does so by itself
            num_stages=tile.stages,
            **constants,
        )
    if splits > 1:
        _merge[(rows, kv_heads, sequences)](
            output,
            scratch,
            seq_lens,
            query_start_loc,
            window,
            splits,
            rows,
            output.stride(0),
            output.stride(1),
            DIM=page.head_dim,
            DIMS=page.dims,
            CHUNK=64,
            num_warps=4,
            enable_fp_fusion=True,  # Triton 3.10 no longer does so by itself
            **constants,
        )
