"""Attention over the packed pages: checks, the query's rotation, and the choice between decode and prefill kernels."""

from __future__ import annotations

import math

import torch

from resq_vllm.errors import ResQError
from resq_vllm.gpu_kv import cuda_decode
from resq_vllm.gpu_kv.checks import check_attention
from resq_vllm.gpu_kv.decode import decode
from resq_vllm.gpu_kv.page import page_of
from resq_vllm.gpu_kv.prefill import prefill
from resq_vllm.gpu_kv.rotation import rotate_query
from resq_vllm.gpu_kv.schedule import (
    CUDA_PROGRAMS_PER_SM,
    DECODE_ROWS,
    PROGRAMS_PER_SM,
    decode_splits,
    split_bytes,
)


def attention(
    query: torch.Tensor,
    cache: torch.Tensor,
    output: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    rotation: torch.Tensor | None,
    scale: float,
    high: int,
    low_bits: int,
    window: int,
    max_query_len: int,
    max_seq_len: int,
    workspace: torch.Tensor | None,
    *,
    num_sms: int,
    cuda_kernel: bool = True,
) -> None:
    """Causal attention of every query token over its sequence's packed pages (reference.attention), into ``output``.

    query, output [>= T, H, hd] bf16, float16 or float32, last dim contiguous: without overlap, or one tensor where the
    query is rotated already and rotation None; cache uint8 [blocks, Hkv, N, C] with contiguous pages; block_table int32
    [S, blocks], seq_lens int32 [S] (new tokens included), query_start_loc int32 [S+1]; rotation float32 [hd, hd] or
    None; window: tokens a query sees, itself included, −1 = all. max_query_len, max_seq_len: bounds, host integers.
    workspace: uint8 [>= workspace_bytes(…)], scratch.

    The launch follows from shapes, bounds and num_sms alone; nothing is allocated or synchronized, so a CUDA graph can
    hold it. Rows that no sequence covers are left alone, sequences without queries or tokens are skipped. Batches of
    at most 16 query rows a sequence and kv head (max_query_len·H/Hkv) take the decode kernel, others the blocked one.
    cuda_kernel: decode by the CUDA kernel where it takes such pages; False: by Triton's, to compare.
    Raises ResQError on bad arguments, before anything is launched.
    """
    head_dim = query.shape[2]
    page = page_of(head_dim, high, low_bits, cache.shape[2])
    check_attention(query, cache, output, block_table, seq_lens, query_start_loc, rotation, page)
    sequences, heads, kv_heads = seq_lens.shape[0], query.shape[1], cache.shape[1]
    if not sequences or not query.shape[0]:
        return
    is_decode = max_query_len * (heads // kv_heads) <= DECODE_ROWS
    turned = query if rotation is None else output
    cuda_kernel = is_decode and cuda_kernel and not cuda_decode.refusal(page, query.dtype, query.device)
    cuda_kernel = cuda_kernel and cuda_decode.is_aligned(turned)
    programs = CUDA_PROGRAMS_PER_SM if cuda_kernel else PROGRAMS_PER_SM
    splits = decode_splits(sequences, kv_heads, num_sms, max_seq_len, programs) if is_decode else 1
    needed = split_bytes(sequences, splits, heads, head_dim, max_query_len)
    given = 0 if workspace is None else workspace.numel() * workspace.element_size()
    if given < needed:
        raise ResQError(f"attention over {sequences} sequences needs a workspace of {needed} bytes, not {given}")

    if rotation is not None:
        rotate_query(query, output, query_start_loc, rotation)
    log2_scale = scale * math.log2(math.e)
    if is_decode:
        decode(
            turned,
            cache,
            output,
            block_table,
            seq_lens,
            query_start_loc,
            log2_scale,
            window,
            max_query_len,
            splits,
            workspace,
            page,
            cuda_kernel,
        )
    else:
        prefill(turned, cache, output, block_table, seq_lens, query_start_loc, log2_scale, window, page)
