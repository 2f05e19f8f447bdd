"""Engines as contenders: what their process is told, and the sentence when it fails."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import engine_contenders, engine_process
from benchmarks.dummy_model import CONFIGS, SHAPES, Shape
from benchmarks.engine_contenders import (
    CONTENDERS,
    EngineContender,
    Setting,
    Together,
    engine_spec,
    llama_spec,
    prepare,
    require_package,
    run_engine,
    weightless_engine_gib,
)
from benchmarks.engine_process import EngineError
from benchmarks.scenarios import Cell, Scenario
from resq_vllm.errors import ResQError

CELLS = (Cell(Scenario("decode", 32, 128), 1), Cell(Scenario("decode", 32, 128), 16))


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting(SHAPES["small"], CELLS, tmp_path, {})


def child(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every engine's process run `code` instead; spec and answer are its arguments."""
    monkeypatch.setattr(engine_contenders, "_command", lambda module: [sys.executable, "-c", code])


def test_every_contender_has_a_model() -> None:
    assert all(contender.model == "gguf" or contender.model in CONFIGS for contender in CONTENDERS.values())
    assert [CONTENDERS[name].lm_head_bits for name in ("resq", "resq-lm8", "resq-lm4")] == [16, 8, 4]


def test_engine_is_told_the_longest_request_and_all_streams(setting: Setting) -> None:
    contender = CONTENDERS["fp8-kv"]
    spec = engine_spec(contender, setting, prepare(contender, setting), seed=3)
    assert spec["max_model_len"] == 160 + 16
    assert spec["max_num_seqs"] == 16
    assert spec["options"] == {"enforce_eager": False, "kv_cache_dtype": "fp8"}
    assert [Cell.from_dict(cell) for cell in spec["cells"]] == list(CELLS)


def test_engine_without_weights_is_told_the_same_but_runs_no_cell(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    child("import sys; open(sys.argv[2], 'w').write('{\"loaded_gib\": 1.25}')", monkeypatch)
    assert weightless_engine_gib(setting) == 1.25
    told = json.loads((setting.folder / "weightless.spec.json").read_text())
    theirs = engine_spec(CONTENDERS["bf16"], setting, prepare(CONTENDERS["bf16"], setting), seed=0)
    assert told.pop("cells") == []
    assert told.pop("imports") == ["benchmarks.weightless"]
    assert {key: value for key, value in told.items() if key != "model"}.items() <= theirs.items()


def test_cache_holds_all_streams_in_bf16(setting: Setting) -> None:
    shape = setting.shape
    per_token = 2 * 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim
    assert setting.kv_cache_bytes >= 16 * 160 * per_token
    assert setting.kv_cache_bytes % (128 * per_token) == 0


def test_llama_finds_its_package_and_uses_all_cores(setting: Setting, tmp_path: Path) -> None:
    spec = llama_spec(replace(setting, packages={"llama_cpp": tmp_path}), tmp_path / "model.gguf", 0)
    assert spec["python_path"] == [str(tmp_path)]
    assert spec["threads"] >= 1


def test_model_that_this_release_cannot_make(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(shape: Shape) -> dict[str, object]:
        raise ResQError("no such lm_head")

    monkeypatch.setitem(CONFIGS, "resq-lm8", refusing)
    with pytest.raises(EngineError, match="no such lm_head"):
        prepare(CONTENDERS["resq-lm8"], setting)


def test_answer_comes_with_the_cache_that_the_log_names(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = {"cells": {"decode/1": {"tokens_s": 5.0}}, "rss_gib": 1.5, "loaded_gib": 1.0}
    write = f"(new := pathlib.Path(sys.argv[2] + '.new')).write_text({json.dumps(answer)!r}); new.rename(sys.argv[2])"
    code = f"import pathlib, sys; print('CPU KV cache size: 12,345 tokens'); {write}"
    child(code, monkeypatch)
    assert run_engine("bf16", CONTENDERS["bf16"], setting, 0) == answer | {"kv_tokens": 12345}


def test_failing_engine_is_a_sentence_with_its_last_lines(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    child("import sys; print('loading'); sys.exit('no such kernel')", monkeypatch)
    message = r"its process ended with exit status 1; the last lines of its output are:\n(loading\n)?no such kernel"
    with pytest.raises(EngineError, match=message):
        run_engine("bf16", CONTENDERS["bf16"], setting, 0)


def test_crashing_engine_names_the_signal(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    child("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", monkeypatch)
    with pytest.raises(EngineError, match="signal SIGSEGV"):
        run_engine("bf16", CONTENDERS["bf16"], setting, 0)


def test_answer_of_an_earlier_process_is_not_read_again(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    (setting.folder / "bf16.answer.json").write_text("{}")
    child("pass", monkeypatch)
    with pytest.raises(EngineError, match="exit status 0"):
        run_engine("bf16", CONTENDERS["bf16"], setting, 0)


def test_endless_engine_is_stopped(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_process, "PATIENCE_SECONDS", 0.2)
    child("import time; time.sleep(60)", monkeypatch)
    with pytest.raises(EngineError, match=r"was still running after 0\.2 s"):
        run_engine("bf16", CONTENDERS["bf16"], setting, 0)


PASSES = """
import sys
from pathlib import Path
from benchmarks.engine_process import answer_passes
print("CPU KV cache size: 8 tokens", flush=True)
count = 0
def one_pass():
    global count
    count += 1
    return {"pass": count}
answer_passes(sys.stdin, one_pass, Path(sys.argv[2]))
"""


def test_engines_that_stay_loaded(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    child(PASSES, monkeypatch)
    monkeypatch.setattr(Together, "quiet_seconds", 0.0)
    with Together() as engines:
        found = [engines.run(name, CONTENDERS[name], setting, 0)["pass"] for name in ("bf16", "resq", "resq", "bf16")]
        assert found == [1, 1, 2, 2]
        running = list(engines._engines.values())
    assert all(engine._process.poll() is not None for engine in running)
    assert run_engine("bf16", CONTENDERS["bf16"], setting, 0) == {"pass": 1, "kv_tokens": 8}


def test_engine_that_ends_between_its_turns(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    child(PASSES.replace("sys.stdin, one", "[sys.stdin.readline()], one"), monkeypatch)
    monkeypatch.setattr(Together, "quiet_seconds", 0.0)
    with Together() as engines:
        assert engines.run("bf16", CONTENDERS["bf16"], setting, 0)["pass"] == 1
        with pytest.raises(EngineError, match="its process ended with exit status 0"):
            engines.run("bf16", CONTENDERS["bf16"], setting, 0)


def test_package_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="the package no_such_engine cannot be imported"):
        require_package(EngineContender("bf16", package="no_such_engine"), tmp_path)
    (tmp_path / "no_such_engine.py").write_text("")
    require_package(EngineContender("bf16", package="no_such_engine"), tmp_path)
    require_package(CONTENDERS["bf16"], None)
