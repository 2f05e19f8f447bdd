"""benchmarks.gpu_serve without a GPU: plans, refusals, what is kept, and every child on vLLM's CPU engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer

from benchmarks import gpu_serve, gpu_serve_child, gpu_serve_contenders
from benchmarks.dummy_model import SHAPES
from benchmarks.gpu_serve import Run, chosen, chosen_cells, engine_options, engines, measure
from benchmarks.gpu_serve_child import too_large
from benchmarks.gpu_serve_contenders import CELLS, CONTENDERS, Contender, cell, key, parse_cell
from benchmarks.gpu_serve_process import run_limited

SCRIPT = Path(gpu_serve.__file__).with_suffix(".sh")
TINY = replace(
    SHAPES["small"],
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
FIGURES = {"prefill_tokens_s": 9.0, "ttft_ms": 2.0, "tpot_ms": 1.0, "decode_tokens_s": 50.0, "output_tokens_s": 40.0}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    monkeypatch.setattr(gpu_serve_contenders, "VOCABULARY", 4096)
    memory = {"kv_cache_memory_bytes": 2**26, "enforce_eager": True}
    return Run("tiny", (cell(3, 160, 8), cell(600, 4096)), tmp_path, 600, time.monotonic() + 900, memory)


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


def test_engine_is_made_for_the_longest_and_widest_cell(run: Run) -> None:
    options = engine_options(CONTENDERS["resq-weights"], run)
    assert options["max_model_len"] == 4096 + 64 + 64
    assert options["max_num_seqs"] == 600
    assert options["kv_cache_dtype"] == "bfloat16"
    config = json.loads((Path(options["model"]) / "config.json").read_text())
    assert config["max_position_embeddings"] == options["max_model_len"]


def test_contender_that_fails_is_recorded_with_its_reason(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONTENDERS, "broken", Contender("bf16", {"quantization": "no-such-method"}))
    answer = measure("broken", run)
    assert answer["cells"] == {}
    assert answer["reason"].startswith("ended with exit status 1: ")
    assert "Unknown quantization method: no-such-method" in answer["reason"]


def test_contender_that_hangs_is_stopped_and_keeps_its_cells(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = run.work / "tiny" / "bf16.answer.json"
    written = json.dumps({"kv_tokens": 7, "start_seconds": 1.0, "cells": {"3x160": FIGURES}})
    code = f"import pathlib, time; pathlib.Path({str(answer)!r}).write_text({written!r}); time.sleep(60)"

    def sleeper(command: Any, environment: Any, log: Path, seconds: float) -> str | None:
        return run_limited([sys.executable, "-c", code], environment, log, seconds)

    monkeypatch.setattr(gpu_serve, "run_limited", sleeper)
    found = measure("bf16", replace(run, limit=3))
    assert found["reason"] == "stopped after 3 s"
    assert found["cells"] == {"3x160": FIGURES}


def answered(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every contender answers at once; which did."""
    called: list[str] = []

    def answer(name: str, run: Run) -> dict[str, Any]:
        called.append(name)
        return {"kv_tokens": 10, "cells": {"3x160": FIGURES}, "reason": None}

    monkeypatch.setattr(gpu_serve, "measure", answer)
    return called


def test_stage_goes_on_where_it_stopped(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    (run.work / "tiny").mkdir()
    called = answered(monkeypatch)
    engines(["bf16"], run, lambda line: None)
    engines(["bf16", "resq"], run, lambda line: None)
    assert called == ["bf16", "resq"]
    engines(["bf16"], replace(run, again=True), lambda line: None)
    # Other cells are another measurement.
    engines(["bf16"], replace(run, cells=run.cells[:1]), lambda line: None)
    assert called == ["bf16", "resq", "bf16", "bf16"]


def test_without_time_a_contender_is_left_for_the_next_call(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    called = answered(monkeypatch)
    found = engines(["bf16"], replace(run, deadline=time.monotonic() + 5), lambda line: None)
    assert not called
    assert found["bf16"]["reason"] == "no time left"
    assert not (run.work / "tiny" / "bf16.json").exists()


@pytest.mark.parametrize("name", ["bf16", "resq", "resq-kv"])
def test_child_measures_on_the_cpu_engine(run: Run, name: str) -> None:
    answer = measure(name, run)
    assert answer["reason"] is None
    assert answer["kv_tokens"] > (30_000 if name == "bf16" else 90_000)
    assert set(answer["cells"]["3x160"]) == set(FIGURES)
    assert all(value > 0 for value in answer["cells"]["3x160"].values())
    assert "which holds" in answer["cells"]["600x4096"]["reason"]


def test_answer_is_written_whole(tmp_path: Path) -> None:
    target = tmp_path / "answer.json"
    gpu_serve_child.write_answer(target, {"cells": {}})
    assert json.loads(target.read_text()) == {"cells": {}}
    assert [path.name for path in tmp_path.iterdir()] == ["answer.json"]


def script(*arguments: str, path: str = "/usr/bin:/bin") -> subprocess.CompletedProcess[str]:
    environment = {"PATH": path, "HOME": os.environ.get("HOME", "/")}
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments], capture_output=True, text=True, check=False, env=environment
    )


def test_script_names_its_stages() -> None:
    done = script("everything")
    assert done.returncode == 2
    assert "the stage must be correctness, 8b, 1b or serve, not 'everything'" in done.stderr
    assert script().returncode == 2


def test_script_wants_the_bundle_that_it_is_given(tmp_path: Path) -> None:
    done = script("8b", str(tmp_path / "absent"))
    assert done.returncode == 2
    assert f"there is no folder {tmp_path / 'absent'} to take vLLM from" in done.stderr


def test_script_wants_a_gpu(tmp_path: Path) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    done = script("correctness", path=f"{tmp_path}:/usr/bin:/bin")
    assert done.returncode == 2
    assert "needs an NVIDIA GPU" in done.stderr


def test_script_sets_up_and_runs_its_stage(tmp_path: Path) -> None:
    """With stand-ins for nvidia-smi, the bundle and Python: what is called, in which order."""
    calls = tmp_path / "calls"
    tools = {
        "nvidia-smi": 'case "$1" in -L) echo "GPU 0" ;; *) echo "H200, 580, 9.0, 1" ;; esac',
        # No nvcc here: the check for it fails.
        "python": f'echo "$*" >>{calls}; case "$*" in *cuda_build*) exit 1 ;; esac',
    }
    for name, body in tools.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    (bundle / "install_bundle.sh").write_text(f'mkdir -p "$2"; echo "install $*" >>{calls}; echo >"$2/env.sh"\n')
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(tmp_path / "python")}
    environment |= {"SITE": str(tmp_path / "site"), "WORK": str(tmp_path / "work"), "OUT": str(tmp_path / "out")}
    command = ["bash", str(SCRIPT), "8b", str(bundle), "--contender", "resq"]
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr
    lines = calls.read_text().splitlines()
    assert lines[0] == f"install --to {tmp_path / 'site'} {bundle}/out/core"
    # The second call finds the bundle unpacked.
    assert sum(line.startswith("install") for line in lines) == 1
    assert lines[-1].startswith(f"-m benchmarks.gpu_serve 8b --out {tmp_path / 'out'} --work {tmp_path / 'work'}")
    assert lines[-1].endswith("--contender resq")
    assert (tmp_path / "out" / "gpu.txt").read_text().startswith("H200")
