"""Packed weights lie on 2 MiB pages where they fill one."""

from __future__ import annotations

import resource
import struct
from pathlib import Path

import pytest
import torch

from resq_vllm import ops

HUGE = 2 << 20
SUPPORTED = Path("/sys/kernel/mm/transparent_hugepage").is_dir()


def packed_weight(n: int, columns: int) -> torch.Tensor:
    high = torch.zeros(n, columns, dtype=torch.int8)
    return ops.pack_weight(None, high, 4, n, [columns, 1, 0])[0]


def mapping_flags(address: int) -> list[str]:
    """VmFlags of this process's mapping that holds `address`."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split(" ", 1)[0]
        if "-" in first and not first.endswith(":"):
            begin, end = (int(part, 16) for part in first.split("-"))
            inside = begin <= address < end
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError(f"no mapping holds {address:x}")


def test_large_weight_begins_on_a_huge_page_and_asks_for_them() -> None:
    packed = packed_weight(2048, 2048)
    assert packed.numel() == 2 * HUGE
    assert packed.data_ptr() % HUGE == 0
    assert packed.is_contiguous()
    assert ("hg" in mapping_flags(packed.data_ptr())) == SUPPORTED


def test_small_weight_is_allocated_plainly() -> None:
    packed = packed_weight(64, 64)
    assert packed.untyped_storage().nbytes() == packed.numel()


def resident_pages(begin: int, end: int) -> int:
    """Whole pages of [begin, end) that occupy memory: bit 63 of their entries in the page map."""
    size = resource.getpagesize()
    first, last = -(-begin // size), end // size
    with Path("/proc/self/pagemap").open("rb") as pages:
        pages.seek(8 * first)
        entries = pages.read(8 * max(0, last - first))
    return sum(entry >> 63 for (entry,) in struct.iter_unpack("<Q", entries))


@pytest.mark.skipif(not Path("/proc/self/pagemap").exists(), reason="this system has no /proc/self/pagemap")
def test_room_for_alignment_takes_no_memory() -> None:
    # Blocks of this size come from memory that was touched before, once one of them has been freed.
    for _ in range(3):
        touched = torch.ones(8 * HUGE, dtype=torch.uint8)
        del touched
        packed = packed_weight(2048, 2048)
        storage = packed.untyped_storage()
        begin, end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        assert resident_pages(begin, packed.data_ptr()) == 0
        assert resident_pages(packed.data_ptr() + packed.numel(), end) == 0
        assert resident_pages(packed.data_ptr(), packed.data_ptr() + packed.numel()) > 0


def test_hint_keeps_values_and_reaches_the_mapping() -> None:
    x = torch.arange(3 * HUGE, dtype=torch.int32)
    ops.prefer_huge_pages(x)
    assert torch.equal(x, torch.arange(3 * HUGE, dtype=torch.int32))
    assert ("hg" in mapping_flags(x.data_ptr() + HUGE)) == SUPPORTED


def test_hint_for_less_than_a_page_and_for_nothing() -> None:
    ops.prefer_huge_pages(torch.zeros(3))
    ops.prefer_huge_pages(torch.empty(0))


def test_hint_needs_one_stretch_of_memory() -> None:
    with pytest.raises(RuntimeError, match="x must be contiguous"):
        ops.prefer_huge_pages(torch.zeros(4, 4).T)
