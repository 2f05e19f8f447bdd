"""A user's commands: `vllm serve` asked by the OpenAI client and `vllm bench serve`, and `vllm bench throughput`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from openai import OpenAIError

from benchmarks.client import complete, connect
from benchmarks.environment import vllm_environment
from benchmarks.gpu_serve_answers import Answers, commit
from benchmarks.gpu_serve_contenders import CAPTURE_SIZES, CONTENDERS, cell, key, model_folder
from benchmarks.gpu_serve_engines import Run
from benchmarks.gpu_serve_process import ran_out, reason_in, run_limited, stopped
from benchmarks.gpu_serve_report import NOT_YET
from benchmarks.report import rounded
from benchmarks.scenarios import Cell
from benchmarks.server import LEFTOVER_SECONDS, STOP_SECONDS, ServerError, VLLMServer

# What the stage is judged by: batch 64 at 4k.
SERVED = cell(64, 4096, 128)
_ROOM = 64
_VLLM = (sys.executable, "-m", "vllm.entrypoints.cli.main")
# Of a server's limit, what ending it may take.
END_SECONDS = STOP_SECONDS + LEFTOVER_SECONDS + 2
TITLES = {"serve": "vllm serve, vllm bench serve", "throughput": "vllm bench throughput"}
# Of vLLM's JSON, what the report keeps.
SERVE_FIGURES = ("output_throughput", "total_token_throughput", "median_ttft_ms", "median_tpot_ms", "completed")
THROUGHPUT_FIGURES = ("tokens_per_second", "requests_per_second", "elapsed_time")


def flags(options: dict[str, Any], measured: Cell, memory: dict[str, Any]) -> list[str]:
    """Command-line flags of the engine, the same for every command."""
    tokens = measured.scenario.prompt + measured.scenario.output + _ROOM
    given = {"max_model_len": tokens, "max_num_seqs": measured.streams, **memory, **options}
    words = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    graphs = ["--cudagraph-capture-sizes", *map(str, CAPTURE_SIZES)]
    return ["--load-format", "dummy", "--no-enable-prefix-caching", *words, *graphs]


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


def serve(name: str, run: Run, measured: Cell = SERVED) -> dict[str, Any]:
    """A server from its start to its end, all within the run's limit: the OpenAI client, then `vllm bench serve`."""
    contender, folder = CONTENDERS[name], run.work / "serve"
    folder.mkdir(parents=True, exist_ok=True)
    tokens = measured.scenario.prompt + measured.scenario.output + _ROOM
    model = model_folder(run.work / "models", run.shape, contender, tokens)
    options = flags(contender.options, measured, run.memory)
    answer = folder / f"{name}.serve.json"
    answer.unlink(missing_ok=True)
    row: dict[str, Any] = {"command": TITLES["serve"], "contender": name, "cell": key(measured)}
    deadline = time.monotonic() + run.limit - END_SECONDS

    def left() -> float:
        return max(1.0, deadline - time.monotonic())

    reason: str | None
    try:
        with VLLMServer(model, *options, log=folder / f"{name}.server.log", timeout=left()) as server:
            row["kv_tokens"] = server.kv_tokens()
            row["openai_client"] = bool(complete(connect(server.api_url, left()), "def f(x):\n", 16))
            command = serve_command(server.url, model, measured, answer)
            reason = run_limited(command, vllm_environment(), folder / f"{name}.bench.log", left())
    except (ServerError, OpenAIError) as error:
        reason = stopped(run.limit) if time.monotonic() >= deadline else reason_in(str(error))
    return row | ({"reason": reason} if reason else figures(answer, SERVE_FIGURES))


def throughput(name: str, run: Run, measured: Cell = SERVED) -> dict[str, Any]:
    """`vllm bench throughput` once."""
    contender, folder = CONTENDERS[name], run.work / "serve"
    folder.mkdir(parents=True, exist_ok=True)
    tokens = measured.scenario.prompt + measured.scenario.output + _ROOM
    model = model_folder(run.work / "models", run.shape, contender, tokens)
    answer = folder / f"{name}.throughput.json"
    answer.unlink(missing_ok=True)
    command = throughput_command(model, flags(contender.options, measured, run.memory), measured, answer)
    reason = run_limited(command, vllm_environment(), folder / f"{name}.throughput.log", run.limit)
    row: dict[str, Any] = {"command": TITLES["throughput"], "contender": name, "cell": key(measured)}
    return row | ({"reason": reason} if reason else figures(answer, THROUGHPUT_FIGURES))


def parts(names: Sequence[str]) -> list[tuple[str, str, str]]:
    """Contender, command and name of its answer, contenders in their order."""
    return [(name, command, f"{name} {command}") for name in names for command in TITLES]


def command_rows(names: Sequence[str], answers: Answers) -> list[dict[str, Any]]:
    """A row for every command of these contenders, and of the others that have an answer."""
    return [
        answers.get(kept, {"command": TITLES[command], "contender": name, "reason": NOT_YET})
        for name, command, kept in parts(list(CONTENDERS))
        if name in names or kept in answers
    ]


def run_commands(names: Sequence[str], run: Run, say: Callable[[str], None]) -> bool:
    """Both commands for every contender, those without an answer; whether all have one then."""
    unfinished = []
    for name, command, kept in parts(names):
        if kept in run.answers:
            continue
        if not run.has_time:
            unfinished.append(kept)
            continue
        row = (serve if command == "serve" else throughput)(name, run)
        say(json.dumps(row))
        if ran_out(row.get("reason", "")):
            unfinished.append(kept)
        else:
            run.answers.put(kept, row | {"commit": commit()})
    if unfinished:
        left = f"{max(0, run.seconds_left):.0f} s left, a command's limit is {run.limit:.0f} s"
        say(f"not finished: {', '.join(unfinished)} ({left}); call the stage again")
    return not unfinished
