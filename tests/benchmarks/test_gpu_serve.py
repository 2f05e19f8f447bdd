"""benchmarks.gpu_serve without a GPU: plans, refusals, what is kept, and every child on vLLM's CPU engine."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from benchmarks import gpu_serve, gpu_serve_child, gpu_serve_contenders, gpu_serve_engines
from benchmarks.dummy_model import SHAPES
from benchmarks.gpu_serve import cells_of, chosen, chosen_cells, engine_rows
from benchmarks.gpu_serve_answers import CALL_AGAIN, Answers
from benchmarks.gpu_serve_child import summary, too_large
from benchmarks.gpu_serve_contenders import CELLS, CONTENDERS, Contender, cell, key, parse_cell
from benchmarks.gpu_serve_engines import Run, engine_options, engines, forget, measure
from benchmarks.gpu_serve_process import run_limited
from benchmarks.gpu_serve_report import FIGURES as NAMES
from benchmarks.gpu_serve_report import HOT_FIGURES

TINY = replace(
    SHAPES["small"],
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
FIGURES: dict[str, Any] = dict.fromkeys(NAMES, 1.0) | {f"{name}_range": [0.9, 1.1] for name in HOT_FIGURES}


app = typer.Typer()
app.command()(gpu_serve.main)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    monkeypatch.setattr(gpu_serve_contenders, "VOCABULARY", 4096)
    memory = {"kv_cache_memory_bytes": 2**26, "enforce_eager": True}
    return Run(
        "tiny",
        (cell(3, 160, 8), cell(600, 4096)),
        tmp_path,
        600,
        time.monotonic() + 900,
        memory,
        Answers(tmp_path / "kept"),
    )


def test_cells_cover_the_batches_and_contexts_and_begin_with_what_is_judged() -> None:
    assert key(CELLS[0]) == "64x4096"
    pairs = {(one.streams, one.scenario.prompt) for one in CELLS}
    assert {(b, c) for b in (1, 16, 64, 256) for c in (1024, 8192, 32768)} <= pairs
    assert len(pairs) == len(CELLS)
    assert [parse_cell(key(one)) for one in CELLS] == list(CELLS)


@pytest.mark.parametrize("text", ["64", "x4096", "64x", "0x5", "4096 x 64", "axb"])
def test_cell_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="write STREAMSxCONTEXT, such as 64x4096"):
        chosen_cells([text])


def test_contenders_keep_their_order_and_unknown_ones_are_refused() -> None:
    assert chosen(["resq", "bf16"]) == ["bf16", "resq"]
    assert chosen(None) == list(CONTENDERS)
    with pytest.raises(typer.BadParameter, match="--contender fp4 is not known; known are bf16, resq"):
        chosen(["fp4"])


def test_cell_larger_than_the_cache_is_not_measured() -> None:
    assert too_large(cell(64, 4096), 64 * (4096 + 64)) is None
    assert too_large(cell(64, 4096), 1000) == "needs 266240 tokens of KV cache, which holds 1000"


def test_engine_is_the_same_whichever_of_the_cells_are_asked_for(run: Run) -> None:
    few, all_cells = (engine_options(CONTENDERS["resq"], replace(run, cells=cells)) for cells in (CELLS[:1], CELLS))
    assert few == all_cells
    assert few["cudagraph_capture_sizes"] == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    # Every measured batch has a graph of its own size.
    assert {one.streams for one in CELLS} <= set(few["cudagraph_capture_sizes"])


def test_engine_is_made_for_the_longest_and_widest_cell(run: Run) -> None:
    options = engine_options(CONTENDERS["resq-weights"], replace(run, cells=(cell(600, 4096), cell(1, 65536))))
    assert options["max_model_len"] == 65536 + 64 + 64
    assert options["max_num_seqs"] == 600
    assert options["kv_cache_dtype"] == "bfloat16"
    config = json.loads((Path(options["model"]) / "config.json").read_text())
    assert config["max_position_embeddings"] == options["max_model_len"]


def test_hot_passes_give_median_and_range() -> None:
    found = summary([{"tpot_ms": 3.0}, {"tpot_ms": 1.0}, {"tpot_ms": 2.5}])
    assert found == {"tpot_ms": 2.5, "tpot_ms_range": [1.0, 3.0]}


def test_contender_that_fails_is_recorded_with_its_reason(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONTENDERS, "broken", Contender("bf16", {"quantization": "no-such-method"}))
    answer = measure("broken", run, run.cells)
    assert answer["cells"] == {}
    assert answer["reason"].startswith("ended with exit status 1: ")
    assert "Unknown quantization method: no-such-method" in answer["reason"]


def test_contender_that_hangs_is_stopped_and_keeps_its_cells(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = run.work / "tiny" / "bf16.answer.json"
    written = json.dumps({"kv_tokens": 7, "start_seconds": 1.0, "cells": {"3x160": FIGURES}})
    code = f"import pathlib, time; pathlib.Path({str(answer)!r}).write_text({written!r}); time.sleep(60)"

    def sleeper(command: Any, environment: Any, log: Path, seconds: float) -> str | None:
        return run_limited([sys.executable, "-c", code], environment, log, seconds)

    monkeypatch.setattr(gpu_serve_engines, "run_limited", sleeper)
    found = measure("bf16", replace(run, limit=3), run.cells)
    assert found["reason"] == "stopped after 3 s"
    assert found["cells"] == {"3x160": FIGURES}


def silent(line: str) -> None:
    """Nobody reads along."""


class Children:
    """In place of processes: each finishes `cells` cells and ends with `reason`; who ran, and for which cells."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cells: int = 99, reason: str | None = None) -> None:
        self.cells, self.reason = cells, reason
        self.called: list[tuple[str, tuple[str, ...]]] = []
        monkeypatch.setattr(gpu_serve_engines, "measure", self)

    def __call__(self, name: str, run: Run, cells: list[Any]) -> dict[str, Any]:
        self.called.append((name, tuple(key(one) for one in cells)))
        found = {key(one): dict(FIGURES) for one in cells[: self.cells]}
        answer: dict[str, Any] = {"kv_tokens": 10, "cells": found, "reason": self.reason}
        return answer | ({"running": key(cells[self.cells])} if self.cells < len(cells) and self.cells else {})


def test_stopped_contender_gets_its_later_cells_in_the_next_call(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    children = Children(monkeypatch, 1, "stopped after 600 s")
    # Time for one process: the deadline is checked before each.
    monkeypatch.setattr(Run, "has_time", property(lambda run: not children.called))
    said: list[str] = []
    assert not engines(["bf16"], run, said.append)
    assert said[-1].startswith("not finished: bf16 (")
    assert said[-1].endswith("call the stage again")
    monkeypatch.undo()
    again = Children(monkeypatch)
    # Another process, as after a restart: all that is known comes from the file.
    later = replace(run, answers=Answers(run.work / "kept"))
    assert engines(["bf16"], later, silent)
    assert (children.called, again.called) == ([("bf16", ("3x160", "600x4096"))], [("bf16", ("600x4096",))])
    assert engines(["bf16"], later, silent)
    assert len(again.called) == 1


def test_stopped_contender_has_another_turn_after_the_others(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    children = Children(monkeypatch, 1, "stopped after 600 s")
    assert engines(["bf16", "resq"], run, silent)
    both, last = ("3x160", "600x4096"), ("600x4096",)
    assert children.called == [("bf16", both), ("resq", both), ("bf16", last), ("resq", last)]


def test_contender_that_no_turn_helps_does_not_hold_up_the_others(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    stuck = Children(monkeypatch, 0, "stopped after 600 s")
    said: list[str] = []
    assert not engines(["bf16"], run, said.append)
    assert [name for name, _ in stuck.called] == ["bf16"]
    assert any("give a larger --limit" in line for line in said)
    later = Children(monkeypatch)
    assert engines(["bf16", "resq"], run, silent)
    assert [name for name, _ in later.called] == ["resq", "bf16"]


def test_crash_is_the_answer_of_its_cell_alone(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    three = replace(run, cells=(cell(1, 8), cell(2, 8), cell(3, 8)))
    children = Children(monkeypatch, 1, "ended with exit status 1: no memory")
    assert engines(["resq"], three, silent)
    assert children.called == [("resq", ("1x8", "2x8", "3x8")), ("resq", ("3x8",))]
    kept = run.answers["resq"]["cells"]
    assert kept["2x8"]["reason"] == "ended with exit status 1: no memory"
    assert {name for name, found in kept.items() if "reason" not in found} == {"1x8", "3x8"}


def test_engine_that_does_not_start_is_the_answer_of_all_cells(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    children = Children(monkeypatch, 0, "ended with exit status 1: no kernel")
    assert engines(["w4a16"], run, silent)
    assert len(children.called) == 1
    assert {one["reason"] for one in run.answers["w4a16"]["cells"].values()} == {"ended with exit status 1: no kernel"}


def test_without_a_full_limit_no_contender_starts(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    children = Children(monkeypatch)
    said: list[str] = []
    assert not engines(["bf16"], replace(run, deadline=time.monotonic() + run.limit - 1), said.append)
    assert not children.called
    assert said == ["not finished: bf16 (599 s left, a contender's limit is 600 s); call the stage again"]
    assert "bf16" not in run.answers


def test_again_forgets_the_chosen_cells_alone(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    children = Children(monkeypatch)
    engines(["bf16", "resq"], run, silent)
    forget(["bf16"], replace(run, cells=run.cells[:1]))
    engines(["bf16", "resq"], run, silent)
    assert children.called[2:] == [("bf16", ("3x160",))]


def test_report_has_the_cells_of_all_calls(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESQ_COMMIT", "abc")
    Children(monkeypatch)
    engines(["resq"], replace(run, cells=(parse_cell("16x8192"),)), silent)
    last = replace(run, cells=(parse_cell("64x4096"),))
    engines(["bf16"], last, silent)
    assert cells_of(run.answers, last) == ["64x4096", "16x8192"]
    lines = engine_rows(["bf16"], last)
    found = {(one["contender"], one["streams"]): one.get("reason", one.get("decode_tokens_s")) for one in lines}
    missing = "not measured yet"
    assert found == {("bf16", 64): 1.0, ("resq", 64): missing, ("bf16", 16): missing, ("resq", 16): 1.0}
    assert {one["commit"] for one in lines if "reason" not in one} == {"abc"}


def stage(out: Path, *more: str) -> int:
    arguments = ["8b", "--out", str(out), "--work", str(out / "work"), "--limit", "30", *more]
    done = CliRunner().invoke(app, arguments)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.output
    return done.exit_code


def test_stage_says_by_its_exit_status_that_there_is_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Children(monkeypatch, 1, "stopped after 30 s")
    one = ("--contender", "resq", "--cell", "64x4096")
    assert stage(tmp_path, *one, "--seconds", "20") == CALL_AGAIN
    assert stage(tmp_path, *one) == 0
    assert stage(tmp_path, "--contender", "bf16", "--cell", "1x1024") == 0
    report = json.loads((tmp_path / "gpu_serve_8b.json").read_text())
    measured = {(one["contender"], one["streams"]) for one in report["rows"] if "reason" not in one}
    assert measured == {("resq", 64), ("bf16", 1)}
    names = {"gpu_serve_8b.json", "gpu_serve_8b.answers.json", "gpu_serve_8b.logs.tar.gz"}
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == names


@pytest.mark.parametrize("name", ["bf16", "resq", "resq-kv"])
def test_child_measures_on_the_cpu_engine(run: Run, name: str) -> None:
    answer = measure(name, run, run.cells)
    assert answer["reason"] is None
    assert answer["kv_tokens"] > (30_000 if name == "bf16" else 90_000)
    assert set(answer["cells"]["3x160"]) == set(FIGURES)
    for figure in HOT_FIGURES:
        low, high = answer["cells"]["3x160"].pop(f"{figure}_range")
        assert 0 < low <= answer["cells"]["3x160"][figure] <= high
    assert all(value > 0 for value in answer["cells"]["3x160"].values())
    assert "running" not in answer
    assert "which holds" in answer["cells"]["600x4096"]["reason"]


def test_answer_is_written_whole(tmp_path: Path) -> None:
    target = tmp_path / "answer.json"
    gpu_serve_child.write_answer(target, {"cells": {}})
    assert json.loads(target.read_text()) == {"cells": {}}
    assert [path.name for path in tmp_path.iterdir()] == ["answer.json"]
