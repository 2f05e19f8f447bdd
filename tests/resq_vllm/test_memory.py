"""Freed memory goes back to the operating system."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from resq_vllm import memory

BLOCK = 16 << 20


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(memory._malloc_trim() is None, reason="the C library is not glibc")
def test_block_that_the_allocator_kept_is_released() -> None:
    # glibc keeps blocks of a size that it has seen freed before; the last one stays, so that the heap cannot shrink.
    blocks = [torch.ones(BLOCK, dtype=torch.uint8) for _ in range(8)]
    del blocks[:]
    blocks = [torch.ones(BLOCK, dtype=torch.uint8) for _ in range(8)]
    del blocks[:-1]
    memory.release_freed()
    after_release = resident_bytes()
    blocks += [torch.ones(BLOCK, dtype=torch.uint8) for _ in range(7)]
    assert resident_bytes() - after_release > 6 * BLOCK


def test_library_without_the_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_malloc_trim", lambda: None)
    memory.release_freed()
