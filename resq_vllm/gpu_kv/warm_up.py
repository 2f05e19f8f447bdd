"""Every kernel that batches of a layer can take, compiled and loaded before the first of them.

Triton compiles a kernel when it is first launched. In the capture of a CUDA graph that fails, and vLLM's own warm-up
batches have short contexts, which nothing is split for; while serving it holds a request up for seconds.
"""

from __future__ import annotations

import torch

from resq_vllm.gpu_kv.attention import attention
from resq_vllm.gpu_kv.schedule import DECODE_ROWS
from resq_vllm.gpu_kv.write import FUSED_QUERY_ROWS, write_and_rotate


def warm_up(
    dtype: torch.dtype,
    device: torch.device,
    heads: int,
    kv_heads: int,
    head_dim: int,
    high: int,
    low_bits: int,
    block_size: int,
    content: int,
    window: int,
    max_seq_len: int,
    workspace: torch.Tensor | None,
    *,
    num_sms: int,
) -> None:
    """Launch them on rows that no sequence has: nothing is written but scratch of this call.

    dtype: of the queries; block_size, content: tokens of a page and its bytes a token and kv head; window: tokens a
    query sees, −1 = all; max_seq_len: the longest context to come; workspace as for :func:`attention`.
    """
    cache = torch.empty(1, kv_heads, block_size, content, dtype=torch.uint8, device=device)
    rotation = torch.zeros(head_dim, head_dim, device=device)
    none = torch.zeros(2, dtype=torch.int32, device=device)
    table = torch.zeros(1, 1, dtype=torch.int32, device=device)
    skipped = torch.full((1,), -1, dtype=torch.int64, device=device)
    # Queries that turn beside the write, and too many of them for that.
    for tokens in (1, FUSED_QUERY_ROWS // heads + 1):
        query, output = (torch.empty(tokens, heads, head_dim, dtype=dtype, device=device) for _ in range(2))
        key = torch.empty(tokens, kv_heads, head_dim, dtype=dtype, device=device)
        write_and_rotate(query, key, key, cache, output, skipped, none, rotation, high, low_bits)
    group = heads // kv_heads
    # One token a sequence, as many as decode takes, more; without splits and, where such a batch has any, with.
    for queries in (1, max(1, DECODE_ROWS // group), DECODE_ROWS + 1):
        for length in (1, max_seq_len):
            attention(
                output,
                cache,
                output,
                table,
                none[:1],
                none,
                None,
                1.0,
                high,
                low_bits,
                window,
                queries,
                length,
                workspace,
                num_sms=num_sms,
            )
