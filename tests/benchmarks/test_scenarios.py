"""Scenarios, cells and their figures."""

from __future__ import annotations

import json

import pytest

from benchmarks.scenarios import SCENARIOS, Cell, Measured, Scenario, longest, most_at_once

CELLS = [Cell(Scenario("prefill", 1000, 10, repeats=3), 1), Cell(Scenario("decode", 30, 70), 16)]


def test_one_stream_repeats_and_several_run_at_once() -> None:
    assert [cell.requests for cell in CELLS] == [3, 16]
    assert [cell.tokens for cell in CELLS] == [3030, 1600]
    assert [cell.key for cell in CELLS] == ["prefill/1", "decode/16"]


def test_room_in_context_and_cache() -> None:
    assert longest(CELLS) == 1010
    assert most_at_once(CELLS) == 1600


def test_cell_survives_json() -> None:
    for cell in CELLS:
        assert Cell.from_dict(json.loads(json.dumps(cell.to_dict()))) == cell


def test_figures_count_all_tokens_and_take_medians_of_requests() -> None:
    figures = Measured(10.0, (0.1, 0.3, 9.0), (0.01, 0.02, 0.5)).to_dict(CELLS[0])
    assert figures == pytest.approx({"tokens_s": 303.0, "output_tokens_s": 3.0, "ttft_ms": 300.0, "tpot_ms": 20.0})


def test_names_are_unique() -> None:
    assert len({scenario.name for scenario in SCENARIOS}) == len(SCENARIOS)
