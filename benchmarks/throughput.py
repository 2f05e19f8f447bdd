"""`python -m benchmarks.throughput`: `vllm bench throughput` of ResQ and bf16, taking turns in one run.

The models have random weights (`--load-format dummy`), which costs nothing to make and times the same kernels.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.dummy_model import SHAPES, write_models
from benchmarks.environment import vllm_environment
from benchmarks.machine import machine, today
from benchmarks.pairs import Comparison, interleave

BASELINE = "bf16"
KV_CACHE_BYTES = 512 * 2**20
LOG_TAIL_LINES = 15


class BenchmarkError(RuntimeError):
    """A `vllm bench` process failed; the message is a sentence and the tail of its output."""


@dataclass(frozen=True)
class Workload:
    """Requests of `prompt` input and `output` generated tokens; `requests` of them."""

    name: str
    prompt: int
    output: int
    requests: int


WORKLOADS = (Workload("decode", 32, 128, 32), Workload("prefill", 512, 8, 32))


def bench_command(model: Path, work: Workload, answer: Path) -> list[str]:
    """The `vllm bench throughput` command for one measurement; its figures go to the JSON file `answer`."""
    numbers = {
        "--random-input-len": work.prompt,
        "--random-output-len": work.output,
        "--num-prompts": work.requests,
        "--num-warmups": 1,
        "--max-model-len": work.prompt + work.output + 64,
        "--kv-cache-memory-bytes": KV_CACHE_BYTES,
    }
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "throughput", "--model", str(model)]
    command += ["--dataset-name", "random", "--load-format", "dummy", "--output-json", str(answer)]
    return command + [str(word) for pair in numbers.items() for word in pair]


def tokens_per_second(model: Path, work: Workload, folder: Path) -> float:
    """One `vllm bench throughput` process: tokens (prompt and generated) per second.

    Raises:
        BenchmarkError: when it fails or writes no figures.
    """
    answer = folder / "answer.json"
    answer.unlink(missing_ok=True)
    command = bench_command(model, work, answer)
    done = subprocess.run(
        command, env=vllm_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode != 0 or not answer.exists():
        tail = "\n".join(done.stdout.splitlines()[-LOG_TAIL_LINES:])
        raise BenchmarkError(f"`vllm bench throughput` of {model.name} failed; its last lines are:\n{tail}")
    return float(json.loads(answer.read_text())["tokens_per_second"])


def measurement(model: Path, work: Workload, folder: Path, console: Console) -> Callable[[], float]:
    """One contender as a function without arguments that says what it measured."""

    def measure() -> float:
        rate = tokens_per_second(model, work, folder)
        console.print(f"{work.name:>8} {model.name:<5} {rate:10.1f} tokens/s", highlight=False)
        return rate

    return measure


def row(shape: str, work: Workload, measured: Comparison) -> dict[str, Any]:
    """One line of the JSON report."""
    load = {"prompt_tokens": work.prompt, "output_tokens": work.output, "requests": work.requests}
    return {"shape": shape, "workload": work.name, **load, "tokens_per_second": measured.to_dict()}


def table(rows: list[dict[str, Any]]) -> Table:
    """The report for a terminal."""
    view = Table(title="vllm bench throughput, random weights, tokens/s (medians)")
    for name in ("shape", "workload", "prompt+output", BASELINE, "ResQ", "ResQ / bf16"):
        view.add_column(name, justify="left" if name in ("shape", "workload") else "right")
    for line in rows:
        rates = line["tokens_per_second"]
        lengths = f"{line['prompt_tokens']}+{line['output_tokens']}"
        median = rates["median"]
        figures = (f"{median[BASELINE]:.0f}", f"{median['resq']:.0f}", f"{rates['ratio']['resq']:.2f}")
        view.add_row(line["shape"], line["workload"], lengths, *figures)
    return view


def write_report(path: Path, rows: list[dict[str, Any]]) -> None:
    """JSON with the machine, the date and the rows, written whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".new")
    report = {"machine": machine().to_dict(), "date": today(), "rows": rows}
    temporary.write_text(json.dumps(report, indent=2) + "\n")
    temporary.rename(path)


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    shape: Annotated[list[str] | None, typer.Option(help=f"Shapes to measure: {', '.join(SHAPES)}.")] = None,
    workload: Annotated[list[str] | None, typer.Option(help="Workloads: decode, prefill [both].")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds in which both take turns.")] = 3,
) -> None:
    """Measure ResQ beside bf16 in vLLM and print the table."""
    shapes = shape or ["small"]
    works = [work for work in WORKLOADS if workload is None or work.name in workload]
    unknown = [name for name in shapes if name not in SHAPES]
    if unknown or not works:
        names = f"shapes are {', '.join(SHAPES)}; workloads are {', '.join(work.name for work in WORKLOADS)}"
        raise typer.BadParameter(f"{', '.join(unknown) or workload} is not known; {names}.")
    console = Console()
    console.print(machine().sentence(), highlight=False)
    rows = []
    with tempfile.TemporaryDirectory(prefix="resq-throughput-") as name:
        folder = Path(name)
        for shape_name in shapes:
            models = write_models(folder / shape_name, SHAPES[shape_name])
            for work in works:
                contenders = {key: measurement(model, work, folder, console) for key, model in models.items()}
                rows.append(row(shape_name, work, interleave(contenders, rounds, BASELINE)))
    console.print(table(rows))
    if json_file is not None:
        write_report(json_file, rows)


def run() -> int:
    """Command-line entry; returns the exit status."""
    try:
        typer.run(main)
    except BenchmarkError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(run())
