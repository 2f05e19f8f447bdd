"""The benchmark of memory reads: threads in turn, quantiles."""

from __future__ import annotations

import torch

from benchmarks import memory


def test_every_number_of_threads_has_its_turns_and_torch_its_own_back() -> None:
    before = torch.get_num_threads()
    found = memory.rates((1, 2), seconds=0.0, size=2**20, fewest=3)
    assert torch.get_num_threads() == before
    assert {count: len(rates) for count, rates in found.items()} == {1: 3, 2: 3}
    assert all(0 < rate < 10_000 for rates in found.values() for rate in rates)


def test_turns_go_on_for_as_long_as_asked() -> None:
    (found,) = memory.rates((1,), seconds=0.2, size=2**16, fewest=1).values()
    assert len(found) > 3


def test_row_has_quantiles() -> None:
    line = memory.row(2, [float(value) for value in range(100, 0, -1)])
    assert line == {"threads": 2, "samples": 100, "p10": 11.0, "p25": 26.0, "p50": 51.0, "p75": 76.0, "p90": 91.0}
    assert memory.table([line]).row_count == 1


def test_row_of_a_single_sample() -> None:
    assert set(memory.row(1, [7.0]).values()) == {1, 7.0}
