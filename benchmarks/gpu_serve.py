"""`python -m benchmarks.gpu_serve STAGE`: ResQ and its rivals in vLLM on a GPU; benchmarks/gpu_serve.sh sets it up.

Stages: correctness (the bundled model), 8b and 1b (engines on random weights, all cells), serve (`vllm serve` with the
OpenAI client, `vllm bench serve` and `vllm bench throughput`). Every contender is a process with a time limit of its
own, in the order of benchmarks.gpu_serve_contenders; one that fails is recorded with its reason. What a contender
answered is kept in the work folder: a stage that ran out of time goes on where it stopped when it is called again.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.environment import vllm_environment
from benchmarks.gpu_serve_commands import run_commands
from benchmarks.gpu_serve_contenders import CELLS, CONTENDERS, VOCABULARY, Contender, key, model_folder, parse_cell
from benchmarks.gpu_serve_correctness import check
from benchmarks.gpu_serve_process import run_limited
from benchmarks.gpu_serve_report import rows, table
from benchmarks.report import wide_console, write_report
from benchmarks.scenarios import Cell, longest

STAGES = ("correctness", "8b", "1b", "serve")
# The start of an engine of the 8B shape with CUDA graphs, and its first cells.
FEWEST_SECONDS = 30.0
_SEED = 20241214
# Past the longest request, for the tokens that vLLM rounds up to.
_ROOM = 64


@dataclass(frozen=True)
class Run:
    """What all contenders of a call share. deadline: of time.monotonic(); memory: arguments that size the cache."""

    shape: str
    cells: tuple[Cell, ...]
    work: Path
    limit: float
    deadline: float
    memory: dict[str, Any]
    again: bool = False

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()


def memory_options(kv_cache_bytes: int | None) -> dict[str, Any]:
    """Arguments of the engine that say how much memory it may take."""
    return {"gpu_memory_utilization": 0.9} if kv_cache_bytes is None else {"kv_cache_memory_bytes": kv_cache_bytes}


def engine_options(contender: Contender, run: Run) -> dict[str, Any]:
    """Arguments of vLLM's engine for all cells of a run."""
    tokens = longest(run.cells) + _ROOM
    return {
        "model": str(model_folder(run.work / "models", run.shape, contender, tokens)),
        "max_model_len": tokens,
        "max_num_seqs": max(cell.streams for cell in run.cells),
        **run.memory,
        **contender.options,
    }


def engine_environment() -> dict[str, str]:
    """Of every engine: one process, one import; its log must speak of errors whatever the shell says."""
    return vllm_environment({"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "INFO"})


def measure(name: str, run: Run) -> dict[str, Any]:
    """One contender: {"kv_tokens", "cells", "reason"}, the reason None when it ran to its end."""
    folder = run.work / run.shape
    folder.mkdir(parents=True, exist_ok=True)
    spec_file, answer_file = folder / f"{name}.spec.json", folder / f"{name}.answer.json"
    answer_file.unlink(missing_ok=True)
    spec = {
        "options": engine_options(CONTENDERS[name], run),
        "seed": _SEED,
        "cells": {key(cell): cell.to_dict() for cell in run.cells},
    }
    spec_file.write_text(json.dumps(spec))
    command = [sys.executable, "-m", "benchmarks.gpu_serve_child", str(spec_file), str(answer_file)]
    limit = min(run.limit, run.seconds_left)
    reason = run_limited(command, engine_environment(), folder / f"{name}.log", limit)
    answer: dict[str, Any] = {"kv_tokens": None, "cells": {}}
    if answer_file.exists():
        answer |= json.loads(answer_file.read_text())
    return answer | {"reason": reason}


def engines(names: Sequence[str], run: Run, say: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """Every contender's answer, from the work folder where an earlier call has it already."""
    answers: dict[str, dict[str, Any]] = {}
    wanted = [key(cell) for cell in run.cells]
    for name in names:
        kept = run.work / run.shape / f"{name}.json"
        if kept.exists() and not run.again:
            earlier = json.loads(kept.read_text())
            if earlier["wanted"] == wanted:
                say(f"{name}: measured before, {kept} is kept (--again measures anew)")
                answers[name] = earlier
                continue
        if run.seconds_left < FEWEST_SECONDS:
            say(f"{name}: no time left; call the stage again")
            answers[name] = {"kv_tokens": None, "cells": {}, "wanted": wanted, "reason": "no time left"}
            continue
        started = time.monotonic()
        answers[name] = measure(name, run) | {"wanted": wanted}
        kept.write_text(json.dumps(answers[name]))
        figures = [f"{k} {c['decode_tokens_s']:.0f}" for k, c in answers[name]["cells"].items() if "reason" not in c]
        said = f"{', '.join(figures) or 'no figures'}; {answers[name]['reason'] or 'done'}"
        say(f"{name}: {time.monotonic() - started:.0f} s, decode tokens/s: {said}")
    return answers


def device() -> str:
    """The GPU's name, or that there is none."""
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU: CPU engine"


def chosen(given: list[str] | None) -> list[str]:
    """Contenders in their order. Raises typer.BadParameter for one that is not known."""
    unknown = [name for name in given or () if name not in CONTENDERS]
    if unknown:
        raise typer.BadParameter(f"--contender {', '.join(unknown)} is not known; known are {', '.join(CONTENDERS)}.")
    return [name for name in CONTENDERS if not given or name in given]


def chosen_cells(given: list[str] | None) -> tuple[Cell, ...]:
    """Cells in their order, those that were asked for in the order asked. Raises typer.BadParameter for a wrong one."""
    try:
        return tuple(parse_cell(text) for text in given) if given else CELLS
    except ValueError as error:
        raise typer.BadParameter(f"--cell {error}") from error


def main(
    stage: Annotated[str, typer.Argument(help=f"One of {', '.join(STAGES)}.")],
    out: Annotated[Path, typer.Option(help="Folder for the JSON report.")] = Path("results/gpu-serve"),
    work: Annotated[Path, typer.Option(help="Folder for models, logs and answers.")] = Path("results/gpu-serve/work"),
    checkpoint: Annotated[
        Path | None, typer.Option(help="The bundled model, quantized [made in the work folder].")
    ] = None,
    contender: Annotated[list[str] | None, typer.Option(help="Repeatable [all].")] = None,
    cell: Annotated[list[str] | None, typer.Option(help="STREAMSxCONTEXT, repeatable [all].")] = None,
    limit: Annotated[float, typer.Option(min=1, help="Seconds a contender, or a step of correctness.")] = 110,
    seconds: Annotated[float, typer.Option(min=1, help="Seconds of the stage.")] = 460,
    kv_cache_bytes: Annotated[int | None, typer.Option(help="Of the KV cache [what the GPU has left].")] = None,
    again: Annotated[bool, typer.Option("--again", help="Measure what was measured before, too.")] = False,
) -> None:
    """Run one stage and write its report."""
    if stage not in STAGES:
        raise typer.BadParameter(f"{stage} is no stage; they are {', '.join(STAGES)}.")
    names, cells = chosen(contender), chosen_cells(cell)
    console = wide_console(130)

    def say(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True)

    work, deadline = work.resolve(), time.monotonic() + seconds
    shape = "8b" if stage == "serve" else stage
    run = Run(shape, cells, work, limit, deadline, memory_options(kv_cache_bytes), again)
    report, failed = out / f"gpu_serve_{stage}.json", False
    if stage == "correctness":
        found = check(work, checkpoint, limit, deadline, run.memory, say)
        failed = bool(found["failures"])
        write_report(report, found.pop("rows"), device=device(), **found)
    elif stage == "serve":
        answers = run_commands(names, run, say)
        write_report(report, answers, device=device(), shape=shape, vocabulary=VOCABULARY)
    else:
        lines = rows(engines(names, run, say))
        console.print(table(f"{shape} shape, random weights, {device()}", lines))
        write_report(report, lines, device=device(), shape=shape, vocabulary=VOCABULARY)
    say(f"report: {report}")
    if failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
