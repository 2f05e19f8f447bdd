"""Freed memory goes back to the operating system."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from resq_vllm import memory

BLOCK = 16 << 20


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


GLIBC = pytest.mark.skipif(memory._glibc("mallopt") is None, reason="the C library is not glibc")


@GLIBC
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


HOLES = """
import os, sys, torch
from pathlib import Path
from resq_vllm.memory import return_large_blocks
if sys.argv[1] == "returned":
    return_large_blocks()
resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
del (first := [torch.ones(16 << 20, dtype=torch.uint8)])[:]  # from here on glibc keeps blocks of this size
blocks = [torch.ones(8 << 20, dtype=torch.uint8) for _ in range(16)]
full = resident()
del blocks[::2]
print(full - resident())
"""


@GLIBC
def test_large_blocks_leave_no_holes() -> None:
    """Every second of 16 blocks of 8 MiB is freed: without the setting nothing goes back, with it all."""
    given_back = {
        how: int(subprocess.run([sys.executable, "-c", HOLES, how], capture_output=True, text=True, check=True).stdout)
        for how in ("kept", "returned")
    }
    assert given_back["kept"] < 16 << 20
    assert given_back["returned"] > 60 << 20


KEPT = """
import ctypes, resource, sys, torch
from resq_vllm.memory import keep_freed_blocks
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: pages of 4 KiB, whatever the system prefers
if sys.argv[1] == "kept":
    keep_freed_blocks()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
outputs = lambda: [torch.ones(8 << 20, dtype=torch.uint8) for _ in range(8)]
outputs(), outputs()
before = faults()
outputs()
print(faults() - before)
"""


@GLIBC
def test_outputs_of_a_layer_are_allocated_without_page_faults() -> None:
    """64 MiB, freed and allocated again, are 16,384 pages of 4 KiB."""
    faults = {
        how: int(subprocess.run([sys.executable, "-c", KEPT, how], capture_output=True, text=True, check=True).stdout)
        for how in ("glibc", "kept")
    }
    assert faults["glibc"] > 1000
    assert faults["kept"] < 100


def test_library_without_the_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_glibc", lambda name: None)
    memory.release_freed()
    memory.return_large_blocks()
    memory.keep_freed_blocks()
