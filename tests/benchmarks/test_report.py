"""The JSON file of a benchmark."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.report import rounded, wide_console, write_report


def test_report_holds_machine_date_facts_and_rows(tmp_path: Path) -> None:
    target = tmp_path / "results" / "linear.json"
    write_report(target, [{"M": 1}], threads=2)
    report = json.loads(target.read_text())
    assert set(report) == {"machine", "date", "threads", "rows"}
    assert report["rows"] == [{"M": 1}]
    assert report["threads"] == 2
    assert list(target.parent.iterdir()) == [target]


def test_report_that_cannot_be_written_leaves_the_earlier_one(tmp_path: Path) -> None:
    target = tmp_path / "linear.json"
    target.write_text("earlier")
    with pytest.raises(TypeError):
        write_report(target, [{"M": object()}])
    assert target.read_text() == "earlier"


@pytest.mark.parametrize(("value", "expected"), [(1234.56, 1235.0), (0.00123456, 0.001235), (0.0, 0.0)])
def test_rounded_keeps_significant_digits(value: float, expected: float) -> None:
    assert rounded(value) == expected


def test_console_of_a_file_is_wide_enough_for_tables() -> None:
    assert wide_console(130).width >= 130
