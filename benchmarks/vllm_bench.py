"""The command `vllm bench throughput` itself, as a check on benchmarks.engine_child: a process a measurement."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.engine_contenders import BASELINE, CONTENDERS, Setting, prepare
from benchmarks.engine_process import LOG_TAIL_LINES, EngineError
from benchmarks.environment import vllm_environment
from benchmarks.pairs import interleave
from benchmarks.report import rounded
from benchmarks.scenarios import Cell, longest

MODELS = (BASELINE, "resq", "resq-lm8")


def bench_command(model: Path, cell: Cell, setting: Setting, answer: Path) -> list[str]:
    """The command for one cell; its figures go to the JSON file `answer`."""
    numbers = {
        "--random-input-len": cell.scenario.prompt,
        "--random-output-len": cell.scenario.output,
        "--num-prompts": cell.requests,
        "--num-warmups": 1,
        "--max-num-seqs": cell.streams,
        "--max-model-len": longest(setting.cells) + 64,
        "--kv-cache-memory-bytes": setting.kv_cache_bytes,
    }
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "throughput", "--model", str(model)]
    command += ["--dataset-name", "random", "--load-format", "dummy", "--output-json", str(answer)]
    command += ["--enforce-eager"] if setting.eager else []
    return command + [str(word) for pair in numbers.items() for word in pair]


def tokens_per_second(model: Path, cell: Cell, setting: Setting) -> float:
    """One process: tokens (prompt and generated) per second.

    Raises:
        EngineError: when it fails or writes no figures.
    """
    answer = setting.folder / "bench.json"
    answer.unlink(missing_ok=True)
    command = bench_command(model, cell, setting, answer)
    done = subprocess.run(
        command, env=vllm_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode != 0 or not answer.exists():
        tail = "\n".join(done.stdout.splitlines()[-LOG_TAIL_LINES:])
        raise EngineError(f"`vllm bench throughput` of {model.name} failed; its last lines are:\n{tail}")
    return float(json.loads(answer.read_text())["tokens_per_second"])


def compare(setting: Setting, names: Sequence[str], rounds: int) -> list[dict[str, Any]]:
    """A row for every cell and name (of MODELS, the baseline among them)."""
    models = {name: prepare(CONTENDERS[name], setting) for name in names}

    def measurement(model: Path, cell: Cell) -> Callable[[], float]:
        return lambda: tokens_per_second(model, cell, setting)

    rows = []
    for cell in setting.cells:
        measured = interleave({name: measurement(models[name], cell) for name in names}, rounds, BASELINE)
        rows += [
            {
                "scenario": cell.scenario.name,
                "streams": cell.streams,
                "contender": name,
                "median_tokens_s": rounded(measured.median(name)),
                "ratio_to_bf16": rounded(measured.ratio(name)),
            }
            for name in names
        ]
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The rows for a terminal."""
    view = Table(title="vllm bench throughput, tokens/s (medians)")
    for name in ("scenario", "streams", "contender", "tokens/s", "× bf16"):
        view.add_column(name, justify="left" if name in ("scenario", "contender") else "right")
    for line in rows:
        figures = (f"{line['median_tokens_s']:.1f}", f"{line['ratio_to_bf16']:.2f}")
        view.add_row(line["scenario"], str(line["streams"]), line["contender"], *figures)
    return view
