"""The throughput benchmark: arguments, rounds, rows, table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console

from benchmarks import throughput
from benchmarks.dummy_model import SHAPES
from benchmarks.engine_contenders import EngineContender, Setting
from benchmarks.engine_process import EngineError
from benchmarks.scenarios import Cell, Scenario

CELL = Cell(Scenario("decode", 32, 128), 16)
FIELDS = {
    "scenario",
    "streams",
    "lm_head_bits",
    "contender",
    "median_tokens_s",
    "ratio_to_bf16",
    "ttft_ms",
    "tpot_ms",
    "rss_gib",
    "kv_tokens",
}


def answer(tokens_s: float, rss: float = 3.0) -> dict[str, Any]:
    figures = {"tokens_s": tokens_s, "output_tokens_s": tokens_s / 2, "ttft_ms": 10.0, "tpot_ms": 5.0}
    return {"cells": {CELL.key: figures}, "loaded_gib": rss - 0.5, "rss_gib": rss, "kv_tokens": 4096}


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting(SHAPES["small"], (CELL,), tmp_path, {})


@pytest.fixture
def silent() -> Console:
    return Console(quiet=True)


def test_long_prompts_in_sixteen_streams_only_on_request() -> None:
    brief, full = throughput.cells(None, None, False), throughput.cells(None, None, True)
    assert {cell.key for cell in full} - {cell.key for cell in brief} == {"long/16"}
    assert len(full) == 8
    assert [cell.key for cell in throughput.cells(["decode"], [2], False)] == ["decode/2"]


def test_unknown_scenario_and_nothing_left() -> None:
    with pytest.raises(typer.BadParameter, match="--scenario chat is not known; known are decode, prefill"):
        throughput.cells(["chat"], None, False)
    with pytest.raises(typer.BadParameter, match="ask for it with --full"):
        throughput.cells(["long"], [16], False)


def test_bf16_always_takes_part() -> None:
    assert throughput.chosen_contenders(["resq"]) == ["bf16", "resq"]
    with pytest.raises(typer.BadParameter, match="--contender fast is not known; known are bf16, resq"):
        throughput.chosen_contenders(["fast"])


def test_contenders_take_turns_and_a_failing_one_is_out(
    setting: Setting, silent: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = []

    def run(name: str, contender: EngineContender, setting: Setting, seed: int) -> dict[str, Any]:
        order.append(name)
        if name == "awq":
            raise EngineError("no kernel\ndetails")
        return answer(10.0)

    monkeypatch.setattr(throughput, "run_engine", run)
    measured, unavailable, stopped = throughput.measure(["bf16", "awq", "resq"], setting, 2, silent)
    assert not stopped
    assert order == ["bf16", "awq", "resq", "resq", "bf16"]
    assert {name: len(runs) for name, runs in measured.items()} == {"bf16": 2, "resq": 2}
    assert unavailable == {"awq": "no kernel\ndetails"}


def test_stopped_benchmark_keeps_whole_rounds() -> None:
    answers = {"bf16": [{"n": 1}, {"n": 2}], "resq": [{"n": 1}, {"n": 2}], "w8a8": [{"n": 1}], "awq": []}
    measured, unavailable = throughput.until_stopped(answers, {"gptq": "why"})
    assert measured == {name: [{"n": 1}] for name in ("bf16", "resq", "w8a8")}
    assert unavailable == {"gptq": "why", "awq": throughput.STOPPED}
    with pytest.raises(EngineError, match="stopped"):
        throughput.until_stopped({"bf16": [], "resq": []}, {})


def test_stop_ends_the_measurement_with_what_there_is(
    setting: Setting, silent: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(name: str, *_: object) -> dict[str, Any]:
        if name == "w8a8":
            raise KeyboardInterrupt
        return answer(10.0)

    monkeypatch.setattr(throughput, "run_engine", run)
    measured, unavailable, stopped = throughput.measure(["bf16", "resq", "w8a8"], setting, 1, silent)
    assert stopped
    assert list(measured) == ["bf16", "resq"]
    assert unavailable == {"w8a8": throughput.STOPPED}


def test_without_the_baseline_there_is_no_benchmark(
    setting: Setting, silent: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*_: object) -> dict[str, Any]:
        raise EngineError("no memory")

    monkeypatch.setattr(throughput, "run_engine", run)
    with pytest.raises(EngineError, match="no memory"):
        throughput.measure(["bf16", "resq"], setting, 1, silent)


def test_rows_pair_the_rounds(setting: Setting) -> None:
    # The machine slows down by half in the second round.
    measured = {"bf16": [answer(100.0), answer(50.0)], "resq": [answer(300.0, 1.5), answer(150.0, 1.5)]}
    lines = throughput.rows(measured, setting, weightless_gib=0.5)
    assert [set(line) >= FIELDS for line in lines] == [True, True]
    bf16, resq = lines
    assert (resq["scenario"], resq["streams"], resq["lm_head_bits"]) == ("decode", 16, 16)
    assert resq["median_tokens_s"] == 225.0
    assert resq["ratio_to_bf16"] == 3.0
    assert (bf16["weights_gib"], resq["weights_gib"]) == (2.0, 0.5)
    assert resq["rounds"] == [300.0, 150.0]
    assert throughput.table(lines).row_count == 2


def test_llama_has_no_weightless_engine_to_be_compared_with(setting: Setting) -> None:
    lines = throughput.rows({"bf16": [answer(1.0)], "llama.cpp": [answer(2.0)]}, setting, weightless_gib=0.5)
    assert lines[1]["weights_gib"] is None
    assert lines[1]["lm_head_bits"] == 6
