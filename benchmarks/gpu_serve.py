"""`python -m benchmarks.gpu_serve STAGE`: ResQ and its rivals in vLLM on a GPU; benchmarks/gpu_serve.sh sets it up.

Stages: correctness (the bundled model), 8b and 1b (engines on random weights, all cells), serve (`vllm serve` with the
OpenAI client, `vllm bench serve` and `vllm bench throughput`). Every contender is a process with a time limit of its
own, in the order of benchmarks.gpu_serve_contenders; one that fails is recorded with its reason. No process starts with
less than its full limit: what a stage has no time for, the next call measures (exit status 75), and adds to the report.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.gpu_serve_answers import CALL_AGAIN, Answers, commit, pack
from benchmarks.gpu_serve_commands import command_rows, parts, run_commands
from benchmarks.gpu_serve_contenders import CAPTURE_SIZES, CELLS, CONTENDERS, VOCABULARY, key, parse_cell
from benchmarks.gpu_serve_correctness import check
from benchmarks.gpu_serve_engines import Run, engines, forget, memory_options
from benchmarks.gpu_serve_report import rows, table
from benchmarks.report import wide_console, write_report
from benchmarks.scenarios import Cell

# Stages, and the seconds of one process of each: a server's start and end need more than an engine's.
LIMITS = {"correctness": 110.0, "8b": 110.0, "1b": 110.0, "serve": 150.0}


def cells_of(answers: Answers, run: Run) -> list[str]:
    """Keys of all cells that any call asked for, in their order."""
    known = [key(cell) for cell in (*CELLS, *run.cells)]
    kept = [one for name in CONTENDERS for one in answers.get(name, {"cells": {}})["cells"]]
    asked = {key(cell) for cell in run.cells} | set(kept)
    return [one for one in dict.fromkeys([*known, *kept]) if one in asked]


def engine_rows(names: Sequence[str], run: Run) -> list[dict[str, Any]]:
    """Rows of these contenders and of all that have an answer."""
    nothing: dict[str, Any] = {"kv_tokens": None, "cells": {}}
    shown = {name: run.answers.get(name, nothing) for name in CONTENDERS if name in names or name in run.answers}
    return rows(shown, cells_of(run.answers, run))


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
    stage: Annotated[str, typer.Argument(help=f"One of {', '.join(LIMITS)}.")],
    out: Annotated[Path, typer.Option(help="Folder for report, answers and logs.")] = Path("results/gpu-serve"),
    work: Annotated[Path, typer.Option(help="Folder for models and what else a call needs.")] = Path(
        "results/gpu-serve/work"
    ),
    checkpoint: Annotated[
        Path | None, typer.Option(help="The bundled model, quantized [made in the work folder].")
    ] = None,
    contender: Annotated[list[str] | None, typer.Option(help="Repeatable [all].")] = None,
    cell: Annotated[list[str] | None, typer.Option(help="STREAMSxCONTEXT, repeatable [all].")] = None,
    limit: Annotated[
        float | None, typer.Option(min=30, help="Seconds a contender, a command or a step [110; serve: 150].")
    ] = None,
    seconds: Annotated[float, typer.Option(min=1, help="Seconds of the stage.")] = 460,
    kv_cache_bytes: Annotated[int | None, typer.Option(help="Of the KV cache [what the GPU has left].")] = None,
    again: Annotated[
        bool, typer.Option("--again", help="First forget what earlier calls measured of the chosen.")
    ] = False,
) -> None:
    """Run one stage and write its report; exit status 75: call again, 1: a check of correctness failed."""
    if stage not in LIMITS:
        raise typer.BadParameter(f"{stage} is no stage; they are {', '.join(LIMITS)}.")
    names, cells = chosen(contender), chosen_cells(cell)
    console = wide_console(130)

    def say(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True)

    work, deadline = work.resolve(), time.monotonic() + seconds
    report, shape = out / f"gpu_serve_{stage}.json", "8b" if stage == "serve" else stage

    def renew() -> None:
        """After every answer: a call that is cut off leaves what it measured."""
        lines = command_rows(names, answers) if stage == "serve" else engine_rows(names, run)
        facts = {"shape": shape, "vocabulary": VOCABULARY, "cudagraph_capture_sizes": CAPTURE_SIZES}
        write_report(report, lines, device=device(), commit=commit(), **facts)

    answers = Answers(report.with_suffix(".answers.json"), (lambda: None) if stage == "correctness" else renew)
    run = Run(shape, cells, work, limit or LIMITS[stage], deadline, memory_options(kv_cache_bytes), answers)
    failed = False
    if stage == "correctness":
        if again:
            answers.forget()
        archive = out / "gpu_serve_correctness.checkpoint.tar.gz"
        found = check(work, archive, answers, checkpoint, run.limit, deadline, run.memory, say)
        failed, finished = bool(found["failures"]), not found["unfinished"]
        write_report(report, found.pop("rows"), device=device(), commit=commit(), **found)
    elif stage == "serve":
        if again:
            answers.forget(kept for _, _, kept in parts(names))
        finished = run_commands(names, run, say)
        renew()
    else:
        if again:
            forget(names, run)
        finished = engines(names, run, say)
        console.print(table(f"{shape} shape, random weights, {device()}", engine_rows(names, run)))
        renew()
    pack(report.with_suffix(".logs.tar.gz"), (work / stage).glob("*.log"), work)
    say(f"report: {report}")
    if not finished:
        raise typer.Exit(CALL_AGAIN)
    if failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
