"""Measured ceilings and the least time that they allow."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest

from benchmarks.ceilings import Arithmetic, Ceilings, cache_bytes, dram_read_bytes_per_second, operations_per_second

CEILINGS = Ceilings(dram_gb_s=10.0, int8_top_s=2.0, bf16_top_s=1.0)


def test_reading_bounds_one_token_and_multiplying_bounds_many() -> None:
    weight = 10**7
    for operations, arithmetic, seconds, bound in (
        (2.0 * weight, "int8", 1e-3, "memory"),
        (2048.0 * weight, "int8", 1.024e-2, "compute"),
        (2048.0 * weight, "bf16", 2.048e-2, "compute"),
    ):
        least, what = CEILINGS.seconds(weight, operations, cast(Arithmetic, arithmetic))
        assert least == pytest.approx(seconds)
        assert what == bound


def test_json_has_three_digits() -> None:
    assert Ceilings(1.23456, 2.0, 0.0123456).to_dict() == {"dram_gb_s": 1.23, "int8_top_s": 2.0, "bf16_top_s": 0.0123}


def test_largest_cache_counts(tmp_path: Path) -> None:
    for index, size in enumerate(("48K", "2048K", "491520K", "1M")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
    assert cache_bytes(tmp_path) == 480 * 2**20


def test_machine_that_names_no_cache(tmp_path: Path) -> None:
    assert cache_bytes(tmp_path) == 0


def test_measurements_are_plausible_rates() -> None:
    # Long enough for a try that no other process interrupts: 0.02 s were not on a loaded machine.
    assert 1e8 < dram_read_bytes_per_second(2**22, 0.2) < 1e13
    assert 1e8 < operations_per_second("int8", (256,), 0.2) < 1e15
    assert 1e8 < operations_per_second("bf16", (256,), 0.2) < 1e15
