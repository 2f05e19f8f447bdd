"""Rows times U_C on tensor cores, as accurate as float32: the sum of bf16 products of the rotation's bf16 terms."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from resq_vllm.gpu_kv.arithmetic import as_bf16, loaded_bf16, store_rounded


@triton.jit
def rotate_rows(
    rows,  # pointers [M, 1] to each row's first element
    valid,  # [M, 1]
    rotation,  # pointer, float32 [DIM, DIM]
    columns,  # [1, N]: which columns of the rotation
    column_valid,  # [1, N]
    M: tl.constexpr,
    N: tl.constexpr,
    DIM: tl.constexpr,
    STEP: tl.constexpr,
    TERMS: tl.constexpr,
):
    """float32 [M, N] = rows · rotation[:, columns].

    A bf16 row is exact in bf16, and three bf16 terms hold the 24 bits of a float32 rotation (two hold 16), so each
    product is exact and only the float32 sum rounds. Other types multiply in float32 (float16: 3 terms of tf32).
    """
    total = tl.zeros((M, N), tl.float32)
    for start in range(0, DIM, STEP):
        inner = start + tl.arange(0, STEP)
        x = tl.load(rows + inner[None, :], mask=valid & (inner[None, :] < DIM), other=0.0)
        u = tl.load(rotation + inner[:, None] * DIM + columns, mask=(inner[:, None] < DIM) & column_valid, other=0.0)
        if rows.dtype.element_ty == tl.bfloat16:
            x = loaded_bf16(x)
            first = as_bf16(u)
            rest = u - first.to(tl.float32)
            second = as_bf16(rest)
            if TERMS == 3:  # smallest first
                third = as_bf16(rest - second.to(tl.float32))
                total = tl.dot(x, third, total, input_precision="ieee")
            total = tl.dot(x, second, total, input_precision="ieee")
            total = tl.dot(x, first, total, input_precision="ieee")
        elif rows.dtype.element_ty == tl.float16:
            total = tl.dot(x.to(tl.float32), u, total, input_precision="tf32x3")
        else:
            total = tl.dot(x, u, total, input_precision="ieee")
    return total


@triton.jit
def rotate_query_rows(
    program,
    query,
    output,
    rotation,
    query_start_loc,
    sequences,
    heads,
    query_token,
    query_head,
    output_token,
    output_head,
    DIM: tl.constexpr,
    DIMS: tl.constexpr,
    M: tl.constexpr,
):
    """M (token, head) rows of output = query·U_C, those that a sequence covers."""
    row = program * M + tl.arange(0, M)
    token, head = (row // heads).to(tl.int64), row % heads
    valid = (token >= tl.load(query_start_loc)) & (token < tl.load(query_start_loc + sequences))
    column = tl.arange(0, DIMS)[None, :]
    x = rotate_rows(
        query + (token * query_token + head * query_head)[:, None],
        valid[:, None],
        rotation,
        column,
        column < DIM,
        M,
        DIMS,
        DIM,
        16 if DIM % 32 else 32,
        2,
    )
    place = output + (token * output_token + head * output_head)[:, None] + column
    store_rounded(place, x, valid[:, None] & (column < DIM))


@triton.jit(do_not_specialize=["sequences"], do_not_specialize_on_alignment=["query_start_loc"])
def _rotate_query(
    query,
    output,
    rotation,
    query_start_loc,
    sequences,
    heads,
    query_token,
    query_head,
    output_token,
    output_head,
    DIM: tl.constexpr,
    DIMS: tl.constexpr,
    M: tl.constexpr,
):
    rotate_query_rows(
        tl.program_id(0),
        query,
        output,
        rotation,
        query_start_loc,
        sequences,
        heads,
        query_token,
        query_head,
        output_token,
        output_head,
        DIM,
        DIMS,
        M,
    )


def rotate_query(
    query: torch.Tensor, output: torch.Tensor, query_start_loc: torch.Tensor, rotation: torch.Tensor
) -> None:
    """output = query·U_C, rounded to output's dtype; rows that no sequence covers are left alone.

    The attention kernels then read their query from the output's rows, which they overwrite at their end: no workspace.
    """
    tokens, heads, head_dim = query.shape
    rows = 16 if tokens * heads <= 4096 else 64
    _rotate_query[(triton.cdiv(tokens * heads, rows),)](
        query,
        output,
        rotation,
        query_start_loc,
        query_start_loc.shape[0] - 1,
        heads,
        query.stride(0),
        query.stride(1),
        output.stride(0),
        output.stride(1),
        DIM=head_dim,
        DIMS=max(16, triton.next_power_of_2(head_dim)),
        M=rows,
        num_warps=4,
        enable_fp_fusion=True,  # Triton 3.10 no longer does so by itself
    )
