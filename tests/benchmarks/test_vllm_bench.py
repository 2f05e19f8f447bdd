"""The command `vllm bench throughput`: its arguments, its answer, its failures."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest

from benchmarks import vllm_bench
from benchmarks.dummy_model import SHAPES
from benchmarks.engine_contenders import Setting
from benchmarks.engine_process import EngineError
from benchmarks.scenarios import Cell, Scenario

CELL = Cell(Scenario("decode", 32, 128), 16)


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting(SHAPES["small"], (CELL,), tmp_path, {})


def instead(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        vllm_bench, "bench_command", lambda _model, _cell, _setting, answer: [sys.executable, "-c", code, str(answer)]
    )


def test_command_asks_for_random_weights_and_the_cell(setting: Setting, tmp_path: Path) -> None:
    command = vllm_bench.bench_command(tmp_path / "resq", CELL, setting, tmp_path / "answer.json")
    pairs = dict(itertools.pairwise(command))
    assert pairs["--load-format"] == "dummy"
    assert pairs["--random-input-len"] == "32"
    assert pairs["--random-output-len"] == "128"
    assert pairs["--num-prompts"] == pairs["--max-num-seqs"] == "16"
    assert pairs["--output-json"] == str(tmp_path / "answer.json")
    assert "--enforce-eager" not in command


def test_failing_vllm_is_a_sentence_with_its_last_lines(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    instead("import sys; print('loading', flush=True); sys.exit('no such model')", monkeypatch)
    with pytest.raises(EngineError, match=r"of resq failed; its last lines are:\nloading\nno such model"):
        vllm_bench.tokens_per_second(Path("resq"), CELL, setting)


def test_answer_of_an_earlier_process_is_not_read_again(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    (setting.folder / "bench.json").write_text('{"tokens_per_second": 9.0}')
    instead("pass", monkeypatch)
    with pytest.raises(EngineError):
        vllm_bench.tokens_per_second(Path("resq"), CELL, setting)


def test_rows_hold_what_vllm_wrote(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    instead("import json, sys; json.dump({'tokens_per_second': 123.5}, open(sys.argv[1], 'w'))", monkeypatch)
    rows = vllm_bench.compare(setting, ["bf16", "resq"], 1)
    assert [(line["contender"], line["median_tokens_s"], line["ratio_to_bf16"]) for line in rows] == [
        ("bf16", 123.5, 1.0),
        ("resq", 123.5, 1.0),
    ]
    assert vllm_bench.table(rows).row_count == 2
