"""A user's commands: `vllm serve` asked by the OpenAI client and `vllm bench serve`, and `vllm bench throughput`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.client import complete, connect
from benchmarks.environment import vllm_environment
from benchmarks.gpu_serve_contenders import CONTENDERS, cell, key, model_folder
from benchmarks.gpu_serve_process import reason_in, run_limited
from benchmarks.report import rounded
from benchmarks.scenarios import Cell
from benchmarks.server import ServerError, VLLMServer

if TYPE_CHECKING:
    from benchmarks.gpu_serve import Run

# What the stage is judged by: batch 64 at 4k.
SERVED = cell(64, 4096, 128)
_ROOM = 64
_VLLM = (sys.executable, "-m", "vllm.entrypoints.cli.main")
# Of vLLM's JSON, what the report keeps.
SERVE_FIGURES = ("output_throughput", "total_token_throughput", "median_ttft_ms", "median_tpot_ms", "completed")
THROUGHPUT_FIGURES = ("tokens_per_second", "requests_per_second", "elapsed_time")


def flags(options: dict[str, Any], measured: Cell, memory: dict[str, Any]) -> list[str]:
    """Command-line flags of the engine, the same for every command."""
    tokens = measured.scenario.prompt + measured.scenario.output + _ROOM
    given = {"max_model_len": tokens, "max_num_seqs": measured.streams, **memory, **options}
    words = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return ["--load-format", "dummy", "--no-enable-prefix-caching", *words]


def _random_prompts(measured: Cell) -> list[str]:
    numbers = {
        "--random-input-len": measured.scenario.prompt,
        "--random-output-len": measured.scenario.output,
        "--num-prompts": measured.requests,
    }
    return ["--dataset-name", "random", *(str(word) for pair in numbers.items() for word in pair)]


def serve_command(url: str, model: Path, measured: Cell, answer: Path) -> list[str]:
    """`vllm bench serve` against a server that runs."""
    command = [*_VLLM, "bench", "serve", "--backend", "openai", "--base-url", url, "--model", str(model)]
    command += ["--tokenizer", str(model), "--max-concurrency", str(measured.streams), "--ignore-eos"]
    command += ["--save-result", "--result-dir", str(answer.parent), "--result-filename", answer.name]
    return command + _random_prompts(measured)


def throughput_command(model: Path, options: list[str], measured: Cell, answer: Path) -> list[str]:
    """`vllm bench throughput`, which starts an engine of its own."""
    command = [*_VLLM, "bench", "throughput", "--model", str(model), "--num-warmups", "1"]
    return [*command, "--output-json", str(answer), *_random_prompts(measured), *options]


def figures(answer: Path, names: Sequence[str]) -> dict[str, float]:
    """The named figures of a JSON file of vLLM's."""
    found = json.loads(answer.read_text())
    return {name: rounded(float(found[name])) for name in names if name in found}


def serve(name: str, run: Run, limit: float, measured: Cell = SERVED) -> dict[str, Any]:
    """A server from its start to its end: a completion by the OpenAI client, then `vllm bench serve`."""
    contender, folder = CONTENDERS[name], run.work / "serve"
    folder.mkdir(parents=True, exist_ok=True)
    tokens = measured.scenario.prompt + measured.scenario.output + _ROOM
    model = model_folder(run.work / "models", run.shape, contender, tokens)
    options = flags(contender.options, measured, run.memory)
    answer = folder / f"{name}.serve.json"
    answer.unlink(missing_ok=True)
    row: dict[str, Any] = {"command": "vllm serve, vllm bench serve", "contender": name, "cell": key(measured)}
    try:
        with VLLMServer(model, *options, log=folder / f"{name}.server.log", timeout=limit) as server:
            row["kv_tokens"] = server.kv_tokens()
            row["openai_client"] = bool(complete(connect(server.api_url), "def f(x):\n", 16))
            command = serve_command(server.url, model, measured, answer)
            reason = run_limited(command, vllm_environment(), folder / f"{name}.bench.log", limit)
    except ServerError as error:
        return row | {"reason": reason_in(str(error))}
    return row | ({"reason": reason} if reason else figures(answer, SERVE_FIGURES))


def throughput(name: str, run: Run, limit: float, measured: Cell = SERVED) -> dict[str, Any]:
    """`vllm bench throughput` once."""
    contender, folder = CONTENDERS[name], run.work / "serve"
    folder.mkdir(parents=True, exist_ok=True)
    tokens = measured.scenario.prompt + measured.scenario.output + _ROOM
    model = model_folder(run.work / "models", run.shape, contender, tokens)
    answer = folder / f"{name}.throughput.json"
    answer.unlink(missing_ok=True)
    command = throughput_command(model, flags(contender.options, measured, run.memory), measured, answer)
    reason = run_limited(command, vllm_environment(), folder / f"{name}.throughput.log", limit)
    row: dict[str, Any] = {"command": "vllm bench throughput", "contender": name, "cell": key(measured)}
    return row | ({"reason": reason} if reason else figures(answer, THROUGHPUT_FIGURES))


def run_commands(names: Sequence[str], run: Run, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Both commands for every contender; those of an earlier call are kept in the work folder."""
    rows = []
    for name in names:
        for command in (serve, throughput):
            kept = run.work / "serve" / f"{name}.{command.__name__}.row.json"
            if kept.exists() and not run.again:
                rows.append(json.loads(kept.read_text()))
                continue
            if run.seconds_left < 1:
                rows.append({"command": command.__name__, "contender": name, "reason": "no time left"})
                continue
            row = command(name, run, min(run.limit, run.seconds_left))
            kept.write_text(json.dumps(row))
            say(json.dumps(row))
            rows.append(row)
    return rows
