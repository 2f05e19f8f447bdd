"""`python -m benchmarks.memory`: what the memory gives one thread and all of them, in turn, while time passes.

Few tokens read weights as fast as the memory lets them. On a virtual machine that is not one rate: where its cores
share a physical one for a while, all threads together read hardly more than one of them alone. The quantiles show
whether the machine has one rate or several, before engines are compared on it.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from benchmarks.ceilings import CHUNK_BYTES, READ_BYTES, huge_pages
from benchmarks.kernel_process import restart
from benchmarks.machine import machine, usable_cores
from benchmarks.report import rounded, wide_console, write_report

QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
PAUSE_SECONDS = 0.01


def rates(threads: Iterable[int], seconds: float, size: int = READ_BYTES, fewest: int = 5) -> dict[int, list[float]]:
    """GB/s of sums over pieces of `size` bytes, by number of threads; the numbers take turns for so many seconds."""
    pieces = itertools.cycle(huge_pages(size).split(min(size, CHUNK_BYTES) // 4))
    found: dict[int, list[float]] = {count: [] for count in threads}
    before, ends = torch.get_num_threads(), time.monotonic() + seconds
    try:
        while min(map(len, found.values())) < fewest or time.monotonic() < ends:
            for count, of_count in found.items():
                piece = next(pieces)
                torch.set_num_threads(count)
                torch.sum(piece[:4096])  # wakes the threads
                started = time.perf_counter()
                torch.sum(piece)
                of_count.append(piece.numel() * 4 / (time.perf_counter() - started) / 1e9)
            time.sleep(PAUSE_SECONDS)
    finally:
        torch.set_num_threads(before)
    return found


def row(threads: int, found: Sequence[float]) -> dict[str, Any]:
    """One line of the report: quantiles in GB/s."""
    ordered = sorted(found)
    quantiles = {
        f"p{round(100 * q)}": rounded(ordered[min(len(ordered) - 1, int(q * len(ordered)))]) for q in QUANTILES
    }
    return {"threads": threads, "samples": len(found), **quantiles}


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """The report for a terminal."""
    view = Table(title="Reads from memory, GB/s: quantiles over time")
    for name in rows[0]:
        view.add_column(name, justify="right")
    for line in rows:
        view.add_row(*(f"{value:.1f}" if isinstance(value, float) else str(value) for value in line.values()))
    return view


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads, each on a core of its own [all cores].")] = None,
    seconds: Annotated[float, typer.Option(min=0.0, help="For so long.")] = 30.0,
) -> None:
    """Read memory with one thread and with all, in turn, and print how the rates are spread."""
    try:
        restart(threads or len(usable_cores()))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    console = wide_console()
    console.print(machine().sentence(), highlight=False)
    measured = rates(sorted({1, torch.get_num_threads()}), seconds)
    rows = [row(count, found) for count, found in measured.items()]
    console.print(table(rows))
    one, all_threads = (statistics.median(found) for found in (measured[min(measured)], measured[max(measured)]))
    console.print(f"all threads together read {all_threads / one:.2f} times what one does (medians)", highlight=False)
    if json_file is not None:
        series = {str(count): [rounded(value, 3) for value in found] for count, found in measured.items()}
        write_report(json_file, rows, threads=torch.get_num_threads(), seconds=seconds, series=series)


if __name__ == "__main__":
    typer.run(main)
