"""The CUDA kernel for decodes (csrc/cuda/kv_decode.h): which pages it takes, and its launch.

A page of 64 tokens takes it about 1300 instructions, Triton's kernel 2400 to 2900 (head_dim 128, sm_90, counted in the
machine code; not run on a GPU). What it writes of a split lies where Triton's merge reads it.
"""

from __future__ import annotations

import os
from functools import cache

import torch

from resq_vllm import cuda
from resq_vllm.errors import ResQError
from resq_vllm.gpu_kv.page import Page, page_of

# Of RESQ_KV_PAGES in csrc/cuda/kv_launch.h: an eighth of each is kept at 8 bits.
HEAD_DIMS = (64, 96, 128)
PAGE_TOKENS = 64
# "0": Triton's kernel decodes instead.
SWITCH = "RESQ_CUDA_ATTENTION"


@cache
def refusal(page: Page, dtype: torch.dtype, device: torch.device) -> str:
    """Why Triton's kernel decodes such pages; "" where the CUDA kernel does."""
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH}=0"
    if device.type != "cuda":
        return f"the tensors are on {device.type}"
    if page.tokens != PAGE_TOKENS:
        return f"it takes pages of {PAGE_TOKENS} tokens, not {page.tokens}"
    if page.low_bits != 4 or page.head_dim not in HEAD_DIMS or page.high * 8 != page.head_dim:
        sizes = ", ".join(map(str, HEAD_DIMS))
        return f"it takes 4-bit pages with an eighth of {sizes} dims at 8 bits, not {page.high} of {page.head_dim}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16 queries, not {dtype}"
    try:
        cuda.require(torch.cuda.current_device() if device.index is None else device.index)
    except ResQError as error:
        return str(error)
    return ""


def is_aligned(query: torch.Tensor) -> bool:
    """Whether all heads of query [T, H, hd] begin at multiples of 16 bytes, as in every tensor of vLLM's."""
    return query.data_ptr() % 16 == 0 and query.stride(0) % 8 == 0 and query.stride(1) % 8 == 0


def decode_kernel(
    head_dim: int, high: int, low_bits: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> str:
    """For the log: which kernel decodes such pages, and why where it is Triton's."""
    reason = refusal(page_of(head_dim, high, low_bits, block_size), dtype, device)
    return f"Triton's kernel, not the CUDA kernel: {reason}" if reason else "the CUDA kernel"


def launch(
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
) -> None:
    """As decode.decode, for pages without a refusal; the splits are left unmerged."""
    torch.ops.resq.kv_decode(
        query,
        cache,
        output,
        block_table,
        seq_lens,
        query_start_loc,
        scale,
        page.high,
        window,
        max_query_len,
        splits,
        workspace,
    )
