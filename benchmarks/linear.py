"""`python -m benchmarks.linear`: one linear layer at a time, ours beside every kernel that a vLLM user's CPU could run.

Contenders take turns on weights that rotate through a pool larger than the last-level cache (benchmarks.turns). A row's
`ratio_to_bf16` is against the faster of the stock bf16 paths in that cell, torch's (`bf16`) and vLLM's (`bf16-vllm`);
the row names it. `fraction` is the least time that the measured ceilings allow over the measured time.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from benchmarks.amx import HELP as WITHOUT_AMX
from benchmarks.amx import hide_amx
from benchmarks.ceilings import Ceilings, cache_bytes, measured_ceilings
from benchmarks.kernel_process import restart
from benchmarks.linear_contenders import (
    BF16_BASELINES,
    Contender,
    Linear,
    UnavailableError,
    checked,
    contenders,
)
from benchmarks.machine import machine, usable_cores
from benchmarks.pairs import Comparison
from benchmarks.report import rounded, wide_console, write_report
from benchmarks.turns import copies_in_pool, measure, median_ms
from resq_vllm.ops import isa

SHAPES = ((2048, 2048), (8192, 2048), (2048, 8192), (4096, 4096), (14336, 4096))
TOKENS = (1, 4, 16, 64, 256, 1024)
POOL_BYTES = 3 * 2**29
CELL_SECONDS = 6.0


def parse_shape(text: str) -> tuple[int, int]:
    """(N, K) from "N,K".

    Raises:
        typer.BadParameter: unless these are two positive multiples of 64 (the narrowest tile of a contender) and K one
            of 1024 (so that every site's recipe fits).
    """
    try:
        outputs, columns = (int(word) for word in text.split(","))
    except ValueError as error:
        raise typer.BadParameter(f"--shape {text!r} is not two numbers N,K such as 4096,4096.") from error
    if outputs < 64 or columns < 1024 or outputs % 64 or columns % 1024:
        raise typer.BadParameter(f"--shape {text}: N must be a positive multiple of 64 and K of 1024.")
    return outputs, columns


def chosen(names: Sequence[str] | None, known: Mapping[str, Contender]) -> dict[str, Contender]:
    """The contenders to measure; stock bf16 always takes part, as everything is compared with it.

    Raises:
        typer.BadParameter: for a name that is none of them.
    """
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise typer.BadParameter(f"--contender {', '.join(unknown)} is not known; known are {', '.join(known)}.")
    return {name: known[name] for name in known if not names or name in names or name in BF16_BASELINES}


def suits(name: str, outputs: int, columns: int) -> bool:
    """Whether a shape is measured: down_proj's recipe belongs to layers that are wider at their input."""
    return name != "resq-down" or columns > outputs


def row(
    case: tuple[int, int, int], name: str, contender: Contender, measured: Comparison, ceilings: Ceilings
) -> dict[str, Any]:
    """One line of the report. gb_s: weight bytes over time, in 10^9 a second; top_s: 2·M·N·K over time, in 10^12."""
    tokens, outputs, columns = case
    seconds = median_ms(measured, name) / 1e3
    weight_bytes, work = contender.weight_bytes(outputs, columns), 2.0 * tokens * outputs * columns
    least, bound = ceilings.seconds(weight_bytes, work, contender.arithmetic)
    return {
        "M": tokens,
        "N": outputs,
        "K": columns,
        "contender": name,
        "median_ms": rounded(1e3 * seconds),
        "ratio_to_bf16": rounded(measured.ratio(name)),
        "bf16_path": measured.baseline,
        "gb_s": rounded(weight_bytes / seconds / 1e9),
        "top_s": rounded(work / seconds / 1e12),
        "fraction": rounded(least / seconds, 3),
        "bound": bound,
        "rounds": len(measured.rounds[name]),
    }


def build_pool(
    available: Mapping[str, Contender], outputs: int, columns: int, budget: int
) -> tuple[dict[str, list[Linear]], dict[str, str]]:
    """Copies of one random weight for every contender, equally many, and why the missing ones are missing."""
    weight = torch.randn(outputs, columns, generator=torch.Generator().manual_seed(0)).mul_(columns**-0.5).bfloat16()
    sources, missing = {}, {}
    for name, contender in available.items():
        try:
            sources[name] = checked(name, contender, weight)[0]
        except UnavailableError as reason:
            missing[name] = str(reason)
    copies = copies_in_pool(budget, sum(available[name].weight_bytes(outputs, columns) for name in sources))
    return {name: list(itertools.islice(source, copies)) for name, source in sources.items()}, missing


def measure_cell(pool: Mapping[str, Sequence[Linear]], x: torch.Tensor, rounds: int, seconds: float) -> Comparison:
    """All contenders of a pool for one input x [M, K]."""
    calls = {name: [partial(linear, x) for linear in copies] for name, copies in pool.items()}
    return measure(calls, rounds, seconds, BF16_BASELINES)


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The report for a terminal."""
    view = Table(title="Linear layers (ratio_to_bf16: median of paired ratios to the faster stock bf16, >1 = faster)")
    for name in ("N", "K", "M", "contender", "ms", "× bf16", "GB/s", "TOP/s", "of ceiling", "bound"):
        view.add_column(name, justify="left" if name in ("contender", "bound") else "right")
    previous: tuple[int, ...] | None = None
    for line in rows:
        case = (line["N"], line["K"], line["M"])
        if previous not in (None, case):
            view.add_section()
        head = tuple(str(number) for number in case) if previous != case else ("", "", "")
        previous = case
        mark = " *" if line["contender"] == line["bf16_path"] else ""
        figures = (f"{line['median_ms']:.3f}", f"{line['ratio_to_bf16']:.2f}", f"{line['gb_s']:.1f}")
        rest = (f"{line['top_s']:.2f}", f"{100 * line['fraction']:.0f} %", line["bound"])
        view.add_row(*head, line["contender"] + mark, *figures, *rest)
    return view


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads, each on a core of its own [all cores].")] = None,
    shape: Annotated[list[str] | None, typer.Option(help="N,K of a weight, repeatable [the issue's five].")] = None,
    tokens: Annotated[list[int] | None, typer.Option(min=1, help="M, repeatable [1 4 16 64 256 1024].")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds at most.")] = 25,
    seconds: Annotated[float, typer.Option(min=0.0, help="Seconds a cell, after five rounds.")] = CELL_SECONDS,
    contender: Annotated[list[str] | None, typer.Option(help="Contenders, repeatable; bf16 always runs [all].")] = None,
    pool_mib: Annotated[int, typer.Option(min=1, help="Memory for all copies of a weight.")] = POOL_BYTES >> 20,
    zentorch: Annotated[Path | None, typer.Option(help="Folder where zentorch is installed apart.")] = None,
    without_amx: Annotated[bool, typer.Option("--without-amx", help=WITHOUT_AMX)] = False,
) -> None:
    """Measure linear layers and print the table."""
    shapes = [parse_shape(text) for text in shape] if shape else list(SHAPES)
    known = chosen(contender, contenders(zentorch))
    if without_amx:
        hide_amx()
    try:
        restart(threads or len(usable_cores()))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    console = wide_console()
    console.print(f"{machine().sentence()}; {torch.get_num_threads()} threads; our kernels: {isa()}", highlight=False)
    ceilings = measured_ceilings()
    console.print(f"measured ceilings: {ceilings.to_dict()}", highlight=False)
    rows: list[dict[str, Any]] = []
    pools: list[dict[str, int]] = []
    unavailable: dict[str, str] = {}
    for outputs, columns in shapes:
        wanted = {name: known[name] for name in known if suits(name, outputs, columns) and name not in unavailable}
        pool, missing = build_pool(wanted, outputs, columns, pool_mib << 20)
        unavailable |= missing
        size = sum(len(pool[name]) * known[name].weight_bytes(outputs, columns) for name in pool)
        pools.append({"N": outputs, "K": columns, "copies": len(next(iter(pool.values()))), "mib": round(size / 2**20)})
        for count in tokens or TOKENS:
            x = torch.randn(count, columns, generator=torch.Generator().manual_seed(count)).bfloat16()
            measured = measure_cell(pool, x, rounds, seconds)
            rows += [row((count, outputs, columns), name, known[name], measured, ceilings) for name in pool]
            ours = ", ".join(f"{name} {measured.ratio(name):.2f}" for name in pool if name.startswith("resq"))
            console.print(f"{outputs:>6} × {columns:<6} M {count:<5} × {measured.baseline}: {ours}", highlight=False)
    console.print(table(rows))
    for name, reason in unavailable.items():
        console.print(f"{name} is not measured: {reason}", highlight=False)
    if json_file is not None:
        write_report(
            json_file,
            rows,
            threads=torch.get_num_threads(),
            isa=isa(),
            without_amx=without_amx,
            ceilings=ceilings.to_dict(),
            last_level_cache_bytes=cache_bytes(),
            pools=pools,
            unavailable=unavailable,
        )


if __name__ == "__main__":
    typer.run(main)
