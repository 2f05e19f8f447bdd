"""The attention backend of the CUDA platform with its own Triton kernels, which Triton's interpreter runs on the CPU.

Run by test_attention_kernels.py in a process of its own, with TRITON_INTERPRET=1.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from resq_vllm import attention_kernels, reference
from resq_vllm.attention_kernels import GPUKernels, kernels
from resq_vllm.vllm_api import CommonAttentionMetadata
from tests.resq_vllm.test_attention_kernels import BLOCK, LAYOUT, builder, common, layer_and_impl

SEQ_LENS = [34, 29, 40]
WINDOW = 9


def platform(is_cpu: bool) -> Any:
    return SimpleNamespace(device_name="cuda", is_cpu=lambda: is_cpu, is_cuda=lambda: not is_cpu)


def attended(
    monkeypatch: pytest.MonkeyPatch, is_cpu: bool, given: CommonAttentionMetadata, window: int | None, speculated: int
) -> torch.Tensor:
    """Output of a batch on a cache of old tokens, two rows of padding included, by the platform's kernels."""
    monkeypatch.setattr(attention_kernels, "current_platform", platform(is_cpu))
    monkeypatch.setattr(attention_kernels, "multiprocessors", lambda device: 4)
    kernels.cache_clear()
    g = torch.Generator().manual_seed(3)

    def rows(count: int, heads: int) -> torch.Tensor:
        return torch.randn(count, heads, LAYOUT.head_dim, generator=g).bfloat16()

    layer, impl = layer_and_impl()
    impl.sliding_window = -1 if window is None else window
    kernels().reserve(torch.device("cpu"), impl.heads, 8)
    history = common(SEQ_LENS, SEQ_LENS)
    cache = torch.zeros(9, 2, BLOCK, LAYOUT.bytes_per_token, dtype=torch.uint8)
    old = rows(sum(SEQ_LENS), 2), rows(sum(SEQ_LENS), 2)
    reference.kv_write(*old, cache, history.slot_mapping, layer.key_rotation, LAYOUT)
    tokens = given.num_actual_tokens
    key, value, query = rows(tokens + 2, 2), rows(tokens + 2, 2), rows(tokens + 2, 8)
    output = torch.full_like(query, 7.0)
    impl.forward(layer, query, key, value, cache, builder(monkeypatch, speculated).build(0, given), output)
    return output


@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize(
    ("query_lens", "speculated"),
    [([1, 1, 1], 0), ([1, 1, 17], 0), ([3, 20, 7], 0), ([3, 3, 3], 2), ([3, 1, 12], 2)],
)
def test_backend_gives_what_the_cpu_gives(
    monkeypatch: pytest.MonkeyPatch, query_lens: list[int], speculated: int, window: int | None
) -> None:
    given = common(query_lens, SEQ_LENS)
    gpu = attended(monkeypatch, False, given, window, speculated)
    assert isinstance(kernels(), GPUKernels)
    cpu = attended(monkeypatch, True, given, window, speculated)
    assert (gpu[-2:] == 7.0).all()
    error = (gpu.float() - cpu.float()).norm() / cpu.float().norm()
    # Both round to bf16; the CPU's decode kernels multiply in integers, too.
    assert error < 2e-2


def test_padding_of_a_captured_batch_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph for three sequences, captured with the longest context and replayed for two: the third has no tokens."""
    real = common([1, 1], SEQ_LENS[:2])
    starts = torch.tensor([0, 1, 2, 2], dtype=torch.int32)
    padded = common(
        [1, 1, 0],
        [*SEQ_LENS[:2], 0],
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        max_seq_len=4096,
        slot_mapping=torch.cat([real.slot_mapping, torch.tensor([-1])]),
    )
    expected = attended(monkeypatch, False, real, None, 0)
    found = attended(monkeypatch, False, padded, None, 0)
    torch.testing.assert_close(found[:2], expected[:2], rtol=2e-2, atol=2e-2)
    assert (found[2:] == 7.0).all()
