"""`python -m benchmarks.throughput`: whole engines side by side: ours, stock vLLM in every quantization, llama.cpp.

Models have random weights (`--load-format dummy`), which costs nothing to make and times the same kernels. A process a
contender and round runs all scenarios (benchmarks.engine_child); contenders take turns, one process at a time. With
`--together` a process serves all rounds, so turns are seconds apart: for a machine whose memory's speed drifts.
`--vllm-bench` also runs the command `vllm bench throughput` itself for bf16 and resq (benchmarks.vllm_bench).
"""

from __future__ import annotations

import signal
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks import vllm_bench
from benchmarks.amx import HELP as WITHOUT_AMX
from benchmarks.amx import hide_amx
from benchmarks.dummy_model import SHAPES
from benchmarks.engine_contenders import (
    BASELINE,
    CONTENDERS,
    EngineContender,
    Setting,
    Together,
    require_package,
    run_engine,
    weightless_engine_gib,
)
from benchmarks.engine_process import EngineError
from benchmarks.machine import machine
from benchmarks.pairs import Comparison, turns
from benchmarks.report import rounded, wide_console, write_report
from benchmarks.scenarios import SCENARIOS, STREAMS, Cell

VOCABULARY = 32_000
STOPPED = "stopped before its first round"
TOGETHER = "All engines stay loaded and take turns every pass; needs the memory of all at once."
# 65,536 prompt tokens: minutes for every contender and round.
ONLY_ON_REQUEST = ("long", 16)


def cells(scenarios: Sequence[str] | None, streams: Sequence[int] | None, full: bool) -> tuple[Cell, ...]:
    """The cells that were asked for; without `full` not the one that takes longer than all others together.

    Raises:
        typer.BadParameter: for an unknown scenario, or when nothing is left.
    """
    names = [scenario.name for scenario in SCENARIOS]
    unknown = [name for name in scenarios or () if name not in names]
    if unknown:
        raise typer.BadParameter(f"--scenario {', '.join(unknown)} is not known; known are {', '.join(names)}.")
    chosen = tuple(
        Cell(scenario, count)
        for scenario in SCENARIOS
        for count in streams or STREAMS
        if scenario.name in (scenarios or names) and (full or (scenario.name, count) != ONLY_ON_REQUEST)
    )
    if not chosen:
        raise typer.BadParameter("the scenario long at 16 streams takes minutes a process: ask for it with --full.")
    return chosen


def chosen_contenders(names: Sequence[str] | None) -> list[str]:
    """Contenders in their order; the baseline always takes part.

    Raises:
        typer.BadParameter: for a name that is none of them.
    """
    unknown = [name for name in names or () if name not in CONTENDERS]
    if unknown:
        raise typer.BadParameter(f"--contender {', '.join(unknown)} is not known; known are {', '.join(CONTENDERS)}.")
    return [name for name in CONTENDERS if not names or name in names or name == BASELINE]


def measure(
    names: Sequence[str], setting: Setting, rounds: int, console: Console, together: bool = False
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, str], bool]:
    """What every contender measured, round by round, why the others did not, and whether it was stopped.

    `together`: all engines stay loaded between their turns. A contender that fails once is out. Stopped
    (KeyboardInterrupt), it returns the whole rounds of the contenders that ran: the last minute should not cost the
    hours before.

    Raises:
        EngineError: when the baseline fails, or has not run when it is stopped.
    """
    with Together() as engines:
        return _take_turns(names, setting, rounds, console, engines.run if together else run_engine)


def _take_turns(
    names: Sequence[str],
    setting: Setting,
    rounds: int,
    console: Console,
    run: Callable[[str, EngineContender, Setting, int], dict[str, Any]],
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, str], bool]:
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    unavailable: dict[str, str] = {}
    for seed, name in enumerate(turns(names, rounds)):
        if name in unavailable:
            continue
        contender = CONTENDERS[name]
        try:
            require_package(contender, setting.packages.get(contender.package or ""))
            answer = run(name, contender, setting, seed)
        except KeyboardInterrupt:
            return *until_stopped(measured, unavailable), True
        except EngineError as reason:
            if name == BASELINE:
                raise
            unavailable[name] = str(reason)
            del measured[name]
            console.print(f"{name:>14} is not measured: {str(reason).partition(chr(10))[0]}", highlight=False)
            continue
        measured[name].append(answer)
        rates = ", ".join(f"{key} {figures['tokens_s']:.1f}" for key, figures in answer["cells"].items())
        console.print(f"{name:>14} tokens/s: {rates}", highlight=False)
    return measured, unavailable, False


def until_stopped(
    measured: Mapping[str, list[dict[str, Any]]], unavailable: Mapping[str, str]
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, str]]:
    """The whole rounds of a measurement that was stopped; contenders without any become unavailable.

    Raises:
        EngineError: when the baseline has none.
    """
    ran = {name: answers for name, answers in measured.items() if answers}
    if BASELINE not in ran:
        raise EngineError(STOPPED)
    whole = min(map(len, ran.values()))
    missing = {name: STOPPED for name in measured if name not in ran}
    return {name: answers[:whole] for name, answers in ran.items()}, {**unavailable, **missing}


def rows(
    measured: Mapping[str, Sequence[Mapping[str, Any]]], setting: Setting, weightless_gib: float | None
) -> list[dict[str, Any]]:
    """A row for every cell and contender. tokens/s count prompt and generated tokens, as `vllm bench throughput` does.

    weights_gib: memory after the start, less that of an engine around the same model without weights. So it is weights,
    copies that were made of them, and what a contender's kernels keep for themselves.
    """
    lines = []
    for cell in setting.cells:
        rates = {name: [one["cells"][cell.key]["tokens_s"] for one in runs] for name, runs in measured.items()}
        comparison = Comparison(BASELINE, rates)
        for name, runs in measured.items():
            figures = {
                kind: rounded(statistics.median(one["cells"][cell.key][kind] for one in runs))
                for kind in ("output_tokens_s", "ttft_ms", "tpot_ms")
            }
            rss, loaded = (statistics.median(one[kind] for one in runs) for kind in ("rss_gib", "loaded_gib"))
            llama = CONTENDERS[name].model == "gguf"
            lines.append(
                {
                    "scenario": cell.scenario.name,
                    "prompt_tokens": cell.scenario.prompt,
                    "new_tokens": cell.scenario.output,
                    "streams": cell.streams,
                    "lm_head_bits": CONTENDERS[name].lm_head_bits,
                    "contender": name,
                    "median_tokens_s": rounded(comparison.median(name)),
                    "ratio_to_bf16": rounded(comparison.ratio(name)),
                    **figures,
                    "rss_gib": rounded(rss, 3),
                    "weights_gib": None if llama or weightless_gib is None else rounded(loaded - weightless_gib, 3),
                    "kv_tokens": runs[0]["kv_tokens"],
                    "rounds": rates[name],
                }
            )
    return lines


def table(lines: Sequence[Mapping[str, Any]]) -> Table:
    """The report for a terminal."""
    view = Table(title="Engines, random weights, tokens/s of prompts and answers together (medians)")
    names = (
        "scenario",
        "streams",
        "contender",
        "lm_head",
        "tokens/s",
        "× bf16",
        "TTFT ms",
        "TPOT ms",
        "RSS GiB",
        "KV tokens",
    )
    for name in names:
        view.add_column(name, justify="left" if name in ("scenario", "contender") else "right")
    previous = None
    for line in lines:
        cell = (line["scenario"], f"{line['prompt_tokens']}+{line['new_tokens']}", line["streams"])
        if previous not in (None, cell):
            view.add_section()
        head = (f"{cell[0]} {cell[1]}", str(cell[2])) if cell != previous else ("", "")
        previous = cell
        figures = (f"{line['median_tokens_s']:.1f}", f"{line['ratio_to_bf16']:.2f}", f"{line['ttft_ms']:.0f}")
        memory = (f"{line['rss_gib']:.2f}", "–" if line["kv_tokens"] is None else f"{line['kv_tokens']:,}")
        view.add_row(*head, line["contender"], str(line["lm_head_bits"]), *figures, f"{line['tpot_ms']:.1f}", *memory)
    return view


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    shape: Annotated[str, typer.Option(help=f"Shape of the model: {', '.join(SHAPES)}.")] = "1b",
    vocab: Annotated[int, typer.Option(min=512, help="Vocabulary; Llama 3's is 128256.")] = VOCABULARY,
    scenario: Annotated[list[str] | None, typer.Option(help="decode, prefill, mixed, long, repeatable [all].")] = None,
    streams: Annotated[list[int] | None, typer.Option(min=1, help="Requests at a time, repeatable [1 16].")] = None,
    contender: Annotated[list[str] | None, typer.Option(help="Repeatable; bf16 always runs [all].")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds in which the contenders take turns.")] = 3,
    together: Annotated[bool, typer.Option("--together", help=TOGETHER)] = False,
    full: Annotated[bool, typer.Option("--full", help="The scenario long at 16 streams as well.")] = False,
    eager: Annotated[bool, typer.Option("--eager", help="vLLM without torch.compile, for all contenders.")] = False,
    zentorch: Annotated[Path | None, typer.Option(help="Folder where zentorch is installed apart.")] = None,
    llama: Annotated[Path | None, typer.Option(help="Folder where llama-cpp-python is installed apart.")] = None,
    bench: Annotated[bool, typer.Option("--vllm-bench", help="Also run `vllm bench throughput` (bf16, resq).")] = False,
    keep: Annotated[Path | None, typer.Option(help="Keep models and logs in this folder.")] = None,
    without_amx: Annotated[bool, typer.Option("--without-amx", help=WITHOUT_AMX)] = False,
) -> None:
    """Measure engines and print the table."""
    if shape not in SHAPES:
        raise typer.BadParameter(f"--shape {shape} is not known; known are {', '.join(SHAPES)}.")
    if without_amx:
        hide_amx()
    # `kill` and a timeout's SIGTERM end the engine and write what there is, as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    names, chosen = chosen_contenders(contender), cells(scenario, streams, full)
    packages = {name: path.resolve() for name, path in {"zentorch": zentorch, "llama_cpp": llama}.items() if path}
    console = wide_console(130)
    console.print(machine().sentence(), highlight=False)
    with tempfile.TemporaryDirectory(prefix="resq-throughput-") as temporary:
        folder = Path(temporary) if keep is None else keep.resolve()
        folder.mkdir(parents=True, exist_ok=True)
        setting = Setting(SHAPES[shape].with_vocabulary(vocab), chosen, folder, packages, eager)
        try:
            weightless_gib = weightless_engine_gib(setting)
            console.print(f"an engine without weights occupies {weightless_gib:.2f} GiB", highlight=False)
            measured, unavailable, stopped = measure(names, setting, rounds, console, together)
            lines = rows(measured, setting, weightless_gib)
            commands = (
                vllm_bench.compare(setting, [name for name in measured if name in vllm_bench.MODELS], rounds)
                if bench and not stopped
                else []
            )
        except EngineError as error:
            console.print(f"the baseline does not run: {error}", highlight=False)
            raise typer.Exit(1) from error
    console.print(table(lines))
    if commands:
        console.print(vllm_bench.table(commands))
    for name, reason in unavailable.items():
        console.print(f"{name} is not measured: {reason}", highlight=False)
    if json_file is not None:
        facts = {"shape": shape, "vocabulary": vocab, "eager": eager, "without_amx": without_amx, "together": together}
        write_report(
            json_file,
            lines,
            **facts,
            kv_cache_bytes=setting.kv_cache_bytes,
            weightless_engine_gib=weightless_gib,
            unavailable=unavailable,
            vllm_bench_throughput=commands,
        )
    if stopped:
        raise typer.Exit(130)


if __name__ == "__main__":
    typer.run(main)
