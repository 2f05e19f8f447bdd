"""The attention benchmark: arguments, grid, rows, table."""

from __future__ import annotations

import pytest
import typer

from benchmarks import attention
from benchmarks.attention_contenders import Case
from benchmarks.pairs import Comparison

FIELDS = {"phase", "context", "batch", "head_dim", "gqa", "contender", "median_ms", "ratio_to_bf16"}


def test_unknown_choice_is_named() -> None:
    with pytest.raises(typer.BadParameter, match="--head-dim 96 is not known; known are 64, 128"):
        attention.known("--head-dim", [64, 96], attention.HEAD_DIMS)
    attention.known("--head-dim", None, attention.HEAD_DIMS)


def test_full_grid_is_all_of_it() -> None:
    cases = attention.grid(attention.PHASES, True, None, None, None, None)
    assert len(set(cases)) == len(cases) == 2 * 6 * 3 * 2 * 3


def test_brief_grid_keeps_every_gqa_and_head_dim() -> None:
    cases = attention.grid(attention.PHASES, False, None, None, None, None)
    assert {(case.phase, case.head_dim, case.gqa) for case in cases} == {
        (phase, head_dim, gqa) for phase in attention.PHASES for head_dim in (64, 128) for gqa in (1, 4, 8)
    }
    assert len(cases) < 80


def test_what_is_asked_for_replaces_the_grid() -> None:
    assert attention.grid(["decode"], False, [300], [2], [64], [4]) == [Case("decode", 300, 2, 64, 4)]


def test_row_counts_the_bytes_of_the_batch() -> None:
    measured = Comparison("bf16", {"resq": [1000.0], "bf16": [500.0]})
    line = attention.row(Case("decode", 1000, 4, 64, 4), "resq", 84, measured)
    assert set(line) >= FIELDS
    assert line["median_ms"] == 1.0
    assert line["ratio_to_bf16"] == 2.0
    assert line["gb_s"] == pytest.approx(84 * 8 * 4000 / 1e-3 / 1e9)


def test_contender_that_is_refused_is_named_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(name: str, batch: object) -> None:
        if name == "fp8":
            raise NotImplementedError("FP8 KV cache on CPU requires AVX-512.")

    monkeypatch.setattr(attention, "contender", refusing)
    present, missing = attention.available(["resq", "bf16", "fp8"], [64])
    assert present == ["resq", "bf16"]
    assert missing == {"fp8": "FP8 KV cache on CPU requires AVX-512."}


def test_case_is_measured_and_shown() -> None:
    rows = attention.measure_case(Case("decode", 64, 1, 64, 1), ["resq", "bf16"], 2, 0.0, 2**20)
    assert [line["contender"] for line in rows] == ["resq", "bf16"]
    assert rows[1]["ratio_to_bf16"] == 1.0
    assert attention.table(rows).row_count == 1
