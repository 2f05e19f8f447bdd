"""`python -m benchmarks.attention`: one attention layer's step, ours beside vLLM's CPU attention on bf16 and fp8 pages.

A step writes the new tokens into the cache and attends: one token a sequence (decode), or the last chunk of up to 2048
tokens of the prompts (prefill). Contenders take turns; pages are scattered, and between two uses of a page the whole
pool passes through the caches (decode: in a model, the weights of all layers do that).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from benchmarks.amx import HELP as WITHOUT_AMX
from benchmarks.amx import hide_amx
from benchmarks.attention_contenders import (
    BASELINE,
    KV_HEADS,
    NAMES,
    Batch,
    Case,
    Contender,
    block_tables,
    calls,
    contender,
)
from benchmarks.ceilings import cache_bytes
from benchmarks.kernel_process import restart
from benchmarks.machine import machine, usable_cores
from benchmarks.pairs import Comparison
from benchmarks.report import rounded, wide_console, write_report
from benchmarks.turns import copies_in_pool, measure, median_ms
from resq_vllm.ops import isa

PHASES = ("decode", "prefill")
CONTEXTS = (256, 512, 1024, 2048, 4096, 8192)
BATCHES = (1, 4, 16)
HEAD_DIMS = (64, 128)
GQA = (1, 4, 8)
# Without --full: the corners that bound the rest.
BRIEF_CONTEXTS = {"decode": (256, 1024, 2048, 8192), "prefill": (256, 2048, 8192)}
BRIEF_BATCHES = {"decode": (1, 16), "prefill": (1,)}
POOL_BYTES = 3 * 2**29
# A prompt's keys have just been computed and are still in the caches: no rotation through a large pool.
COPIES = {"decode": 1024, "prefill": 2}
CELL_SECONDS = 3.0


def grid(
    phases: Iterable[str],
    full: bool,
    contexts: Sequence[int] | None,
    batches: Sequence[int] | None,
    head_dims: Sequence[int] | None,
    gqa: Sequence[int] | None,
) -> list[Case]:
    """The cases: what was asked for, and for the rest the whole grid (`full`) or its corners."""
    cases = []
    for phase in phases:
        ours = contexts or (CONTEXTS if full else BRIEF_CONTEXTS[phase])
        many = batches or (BATCHES if full else BRIEF_BATCHES[phase])
        product = itertools.product(head_dims or HEAD_DIMS, gqa or GQA, many, ours)
        cases += [Case(phase, context, batch, head_dim, group) for head_dim, group, batch, context in product]
    return cases


def known(option: str, values: Sequence[Any] | None, choices: Sequence[Any]) -> None:
    """Raise typer.BadParameter for a value that is none of the choices."""
    unknown = [str(value) for value in values or () if value not in choices]
    if unknown:
        names = ", ".join(str(choice) for choice in choices)
        raise typer.BadParameter(f"{option} {', '.join(unknown)} is not known; known are {names}.")


def row(case: Case, name: str, bytes_per_token: int, measured: Comparison) -> dict[str, Any]:
    """One line of the report. gb_s: bytes of the batch's K and V over time, in 10^9 a second."""
    milliseconds = median_ms(measured, name)
    kv_bytes = bytes_per_token * KV_HEADS * case.cached_tokens
    return {
        "phase": case.phase,
        "context": case.context,
        "batch": case.batch,
        "head_dim": case.head_dim,
        "gqa": case.gqa,
        "new_tokens": case.new_tokens,
        "contender": name,
        "median_ms": rounded(milliseconds),
        "ratio_to_bf16": rounded(measured.ratio(name)),
        "gb_s": rounded(kv_bytes / milliseconds / 1e6),
        "rounds": len(measured.rounds[name]),
    }


def measure_case(case: Case, names: Sequence[str], rounds: int, seconds: float, pool: int) -> list[dict[str, Any]]:
    """The rows of one case."""
    batch = Batch(case)
    chosen: dict[str, Contender] = {name: contender(name, batch) for name in names}
    page_bytes = sum(each.bytes_per_token for each in chosen.values()) * KV_HEADS * case.cached_tokens
    tables = block_tables(case, copies_in_pool(pool, page_bytes, COPIES[case.phase]))
    steps = {name: list(calls(each, tables)) for name, each in chosen.items()}
    measured = measure(steps, rounds, seconds, (BASELINE,))
    return [row(case, name, each.bytes_per_token, measured) for name, each in chosen.items()]


def available(names: Iterable[str], head_dims: Iterable[int]) -> tuple[list[str], dict[str, str]]:
    """Contenders that can be called here, and why the others cannot."""
    present, missing = [], {}
    for name in names:
        try:
            for head_dim in head_dims:
                contender(name, Batch(Case("decode", 256, 1, head_dim, 1)))
            present.append(name)
        except (ImportError, NotImplementedError, RuntimeError) as error:
            missing[name] = str(error).partition("\n")[0]
    return present, missing


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The report for a terminal: one line a case, a pair of columns a contender."""
    names = list(dict.fromkeys(line["contender"] for line in rows))
    view = Table(title="Attention step of one layer, 8 kv heads, cache write included (× bf16: >1 = faster)")
    fields = ("phase", "head_dim", "gqa", "batch", "context")
    for field in fields:
        view.add_column(field, justify="left" if field == "phase" else "right")
    for name in names:
        view.add_column(f"{name} ms", justify="right")
    for name in names:
        if name != BASELINE:
            view.add_column(f"{name} × bf16", justify="right")
    for case, lines in itertools.groupby(rows, key=lambda line: tuple(line[field] for field in fields)):
        by_name = {line["contender"]: line for line in lines}
        times = [f"{by_name[name]['median_ms']:.3f}" for name in names]
        ratios = [f"{by_name[name]['ratio_to_bf16']:.2f}" for name in names if name != BASELINE]
        view.add_row(*(str(value) for value in case), *times, *ratios)
    return view


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads, each on a core of its own [all cores].")] = None,
    full: Annotated[bool, typer.Option("--full", help="The whole grid (about an hour), not its corners.")] = False,
    phase: Annotated[list[str] | None, typer.Option(help="decode, prefill [both].")] = None,
    context: Annotated[list[int] | None, typer.Option(min=1, help="Tokens of a sequence, repeatable.")] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Sequences, repeatable.")] = None,
    head_dim: Annotated[list[int] | None, typer.Option(help="64, 128 [both].")] = None,
    gqa: Annotated[list[int] | None, typer.Option(min=1, help="Query heads a kv head, repeatable [1 4 8].")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds at most.")] = 25,
    seconds: Annotated[float, typer.Option(min=0.0, help="Seconds a case, after five rounds.")] = CELL_SECONDS,
    contender_names: Annotated[
        list[str] | None, typer.Option("--contender", help="resq, fp8; bf16 always runs.")
    ] = None,
    pool_mib: Annotated[int, typer.Option(min=1, help="Memory for all caches of a case.")] = POOL_BYTES >> 20,
    without_amx: Annotated[bool, typer.Option("--without-amx", help=WITHOUT_AMX)] = False,
) -> None:
    """Measure attention and print the table."""
    known("--phase", phase, PHASES)
    known("--head-dim", head_dim, HEAD_DIMS)
    known("--contender", contender_names, NAMES)
    if without_amx:
        hide_amx()
    try:
        restart(threads or len(usable_cores()))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    wanted = [name for name in NAMES if not contender_names or name in contender_names or name == BASELINE]
    console = wide_console()
    console.print(f"{machine().sentence()}; {torch.get_num_threads()} threads; our kernels: {isa()}", highlight=False)
    names, unavailable = available(wanted, head_dim or HEAD_DIMS)
    rows: list[dict[str, Any]] = []
    for case in grid(phase or PHASES, full, context, batch, head_dim, gqa):
        lines = measure_case(case, names, rounds, seconds, pool_mib << 20)
        rows += lines
        ratios = ", ".join(f"{line['contender']} {line['ratio_to_bf16']:.2f}" for line in lines)
        console.print(f"{case} {ratios}", highlight=False)
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
            kv_heads=KV_HEADS,
            pool_mib=pool_mib,
            last_level_cache_bytes=cache_bytes(),
            unavailable=unavailable,
        )


if __name__ == "__main__":
    typer.run(main)
