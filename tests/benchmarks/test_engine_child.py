"""The engine's child process, with a stand-in for vLLM's engine."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import engine_child
from benchmarks.scenarios import Cell, Scenario


class StandIn:
    """Answers every request with as many tokens as asked for, or one fewer."""

    fewer = 0
    last: StandIn

    def __init__(self, **arguments: Any) -> None:
        self.arguments = arguments
        StandIn.last = self
        self.lots: list[list[int]] = []
        self.calls: list[int] = []  # lots that were done when something was called in the workers

    def collective_rpc(self, function: Callable[[object], None]) -> None:
        function(self)
        self.calls.append(len(self.lots))

    def generate(self, prompts: list[dict[str, list[int]]], sampling: Any, use_tqdm: bool) -> list[Any]:
        self.lots.append([len(prompt["prompt_token_ids"]) for prompt in prompts])
        metrics = SimpleNamespace(
            num_generation_tokens=sampling.max_tokens - self.fewer,
            first_token_latency=0.25,
            first_token_ts=10.0,
            last_token_ts=10.0 + 0.01 * (sampling.max_tokens - 1),
        )
        return [SimpleNamespace(metrics=metrics) for _ in prompts]


SPEC = {
    "model": "folder",
    "vocabulary": 100,
    "seed": 1,
    "max_model_len": 64,
    "max_num_seqs": 4,
    "kv_cache_bytes": 2**20,
    "imports": ["json"],
    "options": {"kv_cache_dtype": "fp8"},
    "warm_up": Cell(Scenario("warm-up", 8, 2), 1).to_dict(),
    "cells": [Cell(Scenario("decode", 5, 3), 4).to_dict(), Cell(Scenario("mixed", 7, 2, repeats=2), 1).to_dict()],
}


@pytest.fixture
def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "0")  # so that what Engine sets ends with the test
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=StandIn, SamplingParams=SimpleNamespace))


@pytest.mark.usefixtures("fake_vllm")
def test_all_cells_run_in_one_engine(tmp_path: Path) -> None:
    spec, answer = tmp_path / "spec.json", tmp_path / "answer.json"
    spec.write_text(json.dumps(SPEC))
    engine_child.main(spec, answer)
    measured = json.loads(answer.read_text())
    assert set(measured["cells"]) == {"decode/4", "mixed/1"}
    assert measured["cells"]["decode/4"]["ttft_ms"] == 250.0
    assert measured["cells"]["decode/4"]["tpot_ms"] == pytest.approx(10.0)
    assert measured["rss_gib"] > 0
    assert StandIn.last.lots == [[8], [5, 5, 5, 5], [7], [7]]
    assert StandIn.last.calls == [1]
    assert StandIn.last.arguments["kv_cache_dtype"] == "fp8"
    assert StandIn.last.arguments["load_format"] == "dummy"


@pytest.mark.usefixtures("fake_vllm")
def test_answer_that_is_too_short_is_no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StandIn, "fewer", 1)
    with pytest.raises(RuntimeError, match="did not generate the 3 tokens"):
        engine_child.Engine(SPEC).run(Cell.from_dict(SPEC["cells"][0]))  # type: ignore[index]
