"""The run over all methods: order, cache, failures, files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from offline.compare.run import compare, require_all
from resq_vllm.errors import ResQError
from tests.offline.compare.fakes import LABELS, FakeEngine, FakeTasks


def test_all_methods_in_the_engine_s_order_and_all_files(tmp_path: Path) -> None:
    engine = FakeEngine()
    result = compare("stories", engine, tmp_path)
    assert [row.method for row in result.rows] == list(LABELS)
    assert [method for method, _ in engine.runs] == list(LABELS)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"compare.json", "compare.csv", "compare.md", "compare-bits.png", "compare-gaps.png"} <= names
    saved = json.loads((tmp_path / "compare.json").read_text())
    assert [row["ppl"] for row in saved["rows"]] == [5.5, 29.0, 9.1, 6.4, 7.0]
    assert saved["protocol"]["windows"] == 4
    assert saved["calibration"]["samples"] == 8


def test_chosen_methods_keep_the_order_asked_for(tmp_path: Path) -> None:
    result = compare("m", FakeEngine(), tmp_path, ("resq", "bf16"))
    assert [row.method for row in result.rows] == ["resq", "bf16"]


def test_unknown_method_is_refused_before_any_work(tmp_path: Path) -> None:
    engine = FakeEngine()
    with pytest.raises(ResQError, match="--methods: awq unknown; the methods are bf16, rtn, quarot, lqer, resq"):
        compare("m", engine, tmp_path / "out", ("rtn", "awq"))
    assert not engine.runs
    assert not (tmp_path / "out").exists()


def test_repeated_run_only_reads(tmp_path: Path) -> None:
    first = compare("m", FakeEngine(), tmp_path)
    again = FakeEngine()
    second = compare("m", again, tmp_path)
    assert not again.runs
    assert second.rows == first.rows
    assert second.fingerprint == first.fingerprint


def test_killed_run_goes_on_with_the_next_method(tmp_path: Path) -> None:
    killed = FakeEngine({"quarot": KeyboardInterrupt()})  # type: ignore[dict-item]
    with pytest.raises(KeyboardInterrupt):
        compare("m", killed, tmp_path)
    engine = FakeEngine()
    result = compare("m", engine, tmp_path)
    assert [method for method, _ in engine.runs] == ["quarot", "lqer", "resq"]
    assert len(result.rows) == len(LABELS)


def test_changed_fingerprint_is_measured_again(tmp_path: Path) -> None:
    compare("m", FakeEngine(), tmp_path)
    engine = FakeEngine(version="2")
    compare("m", engine, tmp_path)
    assert len(engine.runs) == len(LABELS)


def test_failing_method_leaves_the_other_rows(tmp_path: Path) -> None:
    lines: list[str] = []
    engine = FakeEngine({"quarot": RuntimeError("no such\nHadamard"), "lqer": ResQError("too few tokens; give more")})
    result = compare("m", engine, tmp_path, say=lines.append)
    assert [row.method for row in result.rows] == ["bf16", "rtn", "resq"]
    assert result.failures == {
        "quarot": "RuntimeError: no such Hadamard",
        "lqer": "too few tokens; give more",
    }
    assert json.loads((tmp_path / "compare.json").read_text())["failures"] == result.failures
    assert any("quarot: failed: RuntimeError: no such Hadamard" in line for line in lines)
    with pytest.raises(ResQError, match="2 of 5 methods failed: quarot"):
        require_all(result, tmp_path)
    # The next run tries only those again.
    mended = FakeEngine()
    require_all(compare("m", mended, tmp_path), tmp_path)
    assert [method for method, _ in mended.runs] == ["quarot", "lqer"]


def test_tasks_run_on_every_model_and_are_cached_with_the_row(tmp_path: Path) -> None:
    tasks = FakeTasks()
    engine = FakeEngine()
    result = compare("m", engine, tmp_path, ("bf16", "resq"), tasks)
    assert engine.runs == [("bf16", True), ("resq", True)]
    assert [row.tasks for row in result.rows] == [{"code": 0.75}] * 2
    compare("m", engine, tmp_path, ("bf16", "resq"), tasks)
    assert tasks.runs == 2
    compare("m", engine, tmp_path, ("bf16", "resq"), FakeTasks("changed"))
    assert len(engine.runs) == 4


def test_rows_without_tasks_are_not_taken_for_rows_with_them(tmp_path: Path) -> None:
    compare("m", FakeEngine(), tmp_path, ("resq",))
    tasks = FakeTasks()
    assert compare("m", FakeEngine(), tmp_path, ("resq",), tasks).rows[0].tasks == {"code": 0.75}
    assert tasks.runs == 1


def test_plots_of_an_earlier_run_with_other_rows_do_not_stay(tmp_path: Path) -> None:
    compare("m", FakeEngine(), tmp_path)
    assert (tmp_path / "compare-gaps.png").exists()
    compare("m", FakeEngine(), tmp_path, ("resq",))
    assert not (tmp_path / "compare-gaps.png").exists()
    assert (tmp_path / "compare-bits.png").exists()


def test_output_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResQError, match="choose a writable output folder"):
        compare("m", FakeEngine(), tmp_path / "file")
