"""Which pages the CUDA decode kernel takes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from resq_vllm import cuda
from resq_vllm.errors import ResQError
from resq_vllm.gpu_kv.cuda_decode import HEAD_DIMS, PAGE_TOKENS, decode_kernel, is_aligned, refusal
from resq_vllm.gpu_kv.page import page_of

GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def usable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU that the library runs on; nothing is remembered from or for other tests."""
    monkeypatch.setattr(cuda, "require", lambda index: None)
    monkeypatch.delenv("RESQ_CUDA_ATTENTION", raising=False)
    refusal.cache_clear()
    yield
    refusal.cache_clear()


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_usual_pages_are_taken(head_dim: int, dtype: torch.dtype) -> None:
    assert refusal(page_of(head_dim, head_dim // 8, 4, PAGE_TOKENS), dtype, GPU) == ""
    assert decode_kernel(head_dim, head_dim // 8, 4, PAGE_TOKENS, dtype, GPU) == "the CUDA kernel"


@pytest.mark.parametrize(
    ("page", "dtype", "device", "reason"),
    [
        ((128, 16, 4, 16), torch.bfloat16, GPU, "it takes pages of 64 tokens, not 16"),
        ((128, 16, 8, 64), torch.bfloat16, GPU, "it takes 4-bit pages with an eighth of 64, 96, 128 dims at 8 bits"),
        ((128, 0, 4, 64), torch.bfloat16, GPU, "at 8 bits, not 0 of 128"),
        ((80, 10, 4, 64), torch.bfloat16, GPU, "at 8 bits, not 10 of 80"),
        ((128, 16, 4, 64), torch.float32, GPU, "it takes bfloat16 and float16 queries, not torch.float32"),
        ((128, 16, 4, 64), torch.bfloat16, torch.device("cpu"), "the tensors are on cpu"),
    ],
)
def test_others_are_not_and_why(
    page: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, reason: str
) -> None:
    assert reason in refusal(page_of(*page), dtype, device)
    assert decode_kernel(*page, dtype, device).startswith("Triton's kernel, not the CUDA kernel: ")


def test_a_library_that_does_not_run_there_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def require(index: int) -> None:
        raise ResQError(f"GPU {index} is too old")

    monkeypatch.setattr(cuda, "require", require)
    assert refusal(page_of(128, 16, 4, 64), torch.bfloat16, GPU) == "GPU 0 is too old"


def test_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESQ_CUDA_ATTENTION", "0")
    assert refusal(page_of(128, 16, 4, 64), torch.bfloat16, GPU) == "RESQ_CUDA_ATTENTION=0"


def test_alignment_of_a_query() -> None:
    flat = torch.zeros(4096, dtype=torch.bfloat16)
    flat = flat[-flat.data_ptr() % 16 // 2 :]
    assert is_aligned(flat[:512].view(2, 4, 64))
    assert not is_aligned(flat[1:513].view(2, 4, 64))
    assert not is_aligned(flat[: 2 * 260].view(2, 260)[:, :256].unflatten(1, (4, 64)))
