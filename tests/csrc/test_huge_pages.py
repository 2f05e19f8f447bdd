"""Packed weights lie on 2 MiB pages where they fill one."""

from __future__ import annotations

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
