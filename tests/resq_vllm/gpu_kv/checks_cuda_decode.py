"""attention, its CUDA kernel emulated and Triton's interpreted (run by test_kernels.py): splits are merged."""

from __future__ import annotations

import pytest
import torch

from resq_vllm.gpu_kv import attention, cuda_decode, workspace_bytes
from resq_vllm.gpu_kv.page import Page
from tests.csrc.cuda import kv_support
from tests.csrc.cuda.support import aligned
from tests.resq_vllm.gpu_kv.batches import Sequence, Shape, batch, errors

SMS = 4


def emulated(
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
    rows, partial, log_sums = max_query_len * query.shape[1] // cache.shape[1], None, None
    if splits > 1:
        assert workspace is not None
        places = len(seq_lens) * cache.shape[1] * rows * splits
        floats = workspace.view(torch.float32)
        partial, log_sums = floats[: places * page.head_dim], floats[places * page.head_dim :][:places]
    batch = query, cache, output, block_table, seq_lens, query_start_loc
    kv_support.run(*batch, scale, window, rows, splits, partial, log_sums, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [-1, 150])
def test_splits_are_merged(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, window: int) -> None:
    monkeypatch.setattr(cuda_decode, "refusal", lambda *arguments: "")
    monkeypatch.setattr(cuda_decode, "launch", emulated)
    shape, longest = Shape(128, 16, 4, 4, 2, 64), 4
    made = batch(shape, [Sequence(900, 1), Sequence(130, 4), Sequence(3, 3), Sequence(70, 0)], dtype)
    size = workspace_bytes(4, shape.heads, shape.kv_heads, shape.head_dim, SMS, longest)
    workspace = torch.full((size // 4,), float("nan")).view(torch.uint8)
    output = torch.full_like(made.query, 77.0, memory_format=torch.contiguous_format)
    tensors = made.query, aligned(made.cache), output, made.block_table, made.seq_lens, made.query_start_loc
    layer = made.rotation, shape.head_dim**-0.5, shape.high, shape.low_bits
    attention(*tensors, *layer, window, longest, 900, workspace, num_sms=SMS)
    found, allowed = errors(made, shape, output, window)
    assert found <= 2 * allowed
    assert bool((output[int(made.query_start_loc[-1]) :] == 77.0).all())
