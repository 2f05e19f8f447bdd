"""`python -m benchmarks.gpu_linear`: one linear layer at a time on a GPU, ours beside what a vLLM user's GPU could run.

First every kernel must equal the reference bit for bit; then contenders take turns, each as a CUDA graph of calls that
rotate through copies of the weight, so that the L2 cache is cold. `ratio_to_bf16`: median of paired ratios to cuBLAS
bf16. `quartiles_us`: of the rounds. `fraction`: the least time that the measured ceilings allow over the measured time.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from benchmarks.pairs import Comparison, interleave
from benchmarks.report import rounded, wide_console, write_report
from resq_vllm import cuda
from resq_vllm.errors import ResQError

TOKENS = (1, 4, 16, 32, 64, 128, 256, 1024, 2048, 8192)
# All copies of a weight together: several times the L2 cache of an H200 (50 MB).
POOL_BYTES = 256 << 20
# A graph is about as long as this, and between one and so many calls.
GRAPH_SECONDS = 2e-3
GRAPH_CALLS = 24
# Engines compute the logits of a sequence's last token alone.
HEAD_TOKENS = 256
NO_GPU = 2


def missing() -> str | None:
    """Why nothing can be measured here, in one sentence."""
    if not torch.cuda.is_available():
        return "benchmarks.gpu_linear needs an NVIDIA GPU of compute capability 8.0 or later, and torch sees none here."
    try:
        cuda.require(torch.cuda.current_device())
    except ResQError as error:
        return str(error)
    return None


# --- ceilings ---------------------------------------------------------------------------------------------------------
def seconds_of(call: Callable[[], object], repeats: int = 10) -> float:
    """Least device time of a call, s."""
    return min(seconds_queued(call) for _ in range(repeats))


def seconds_queued(call: Callable[[], object]) -> float:
    """Device time of a call, s, queued behind one of its own: the host's part of the launch is not in it."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    call()
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def measured_ceilings() -> dict[str, float]:
    """Bytes a second of a copy (read + written), and multiply-adds·2 a second of a large product, by arithmetic."""
    size, side = 1 << 30, 8192
    source, target = torch.randint(0, 255, (2, size), dtype=torch.uint8, device="cuda")
    ceilings = {"bytes": 2 * size / seconds_of(lambda: target.copy_(source))}
    a = torch.randn(side, side, device="cuda", dtype=torch.bfloat16)
    work = 2.0 * side**3
    ceilings["bf16"] = work / seconds_of(lambda: a @ a)
    codes = torch.randint(-128, 127, (side, side), dtype=torch.int8, device="cuda")
    ceilings["int8"] = work / seconds_of(lambda: torch._int_mm(codes, codes.t()))
    if torch.cuda.get_device_capability() >= (8, 9):
        small, one = a.to(torch.float8_e4m3fn), torch.ones((), device="cuda")
        product = lambda: torch._scaled_mm(small, small.t(), one, one, out_dtype=torch.bfloat16)  # noqa: E731
        ceilings["fp8"] = work / seconds_of(product)
    return ceilings


def fraction(ceilings: Mapping[str, float], arithmetic: str, weight_bytes: int, work: float, seconds: float) -> float:
    """Of the time that the slower of memory and arithmetic needs at its ceiling."""
    least = max(weight_bytes / ceilings["bytes"], work / ceilings.get(arithmetic, math.inf))
    return least / seconds


# --- timing -----------------------------------------------------------------------------------------------------------
def captured(calls: Sequence[Callable[[], object]], length: int = 0) -> Callable[[], float]:
    """A CUDA graph of `length` calls in rotation; a turn replays it and returns calls a second.

    length 0: about GRAPH_SECONDS, at most GRAPH_CALLS, but every call once.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    length = length or max(len(calls), min(GRAPH_CALLS, int(GRAPH_SECONDS / seconds_of(calls[0], 3))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(length):
            calls[index % len(calls)]()
    graph.replay()

    def turn() -> float:
        return length / seconds_queued(graph.replay)

    return turn


def must_run(name: str) -> bool:
    """Whether a contender's failure ends the run: ours, and what all are compared with."""
    return name == "bf16" or name.startswith("resq")


def why(error: Exception) -> str:
    """One line of it: a message may be empty, or pages long."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}".removesuffix(": ")


def quartiles_us(measured: Comparison, name: str) -> list[float]:
    """First and third quartile of the rounds' times a call; rounds are calls a second."""
    low, high = measured.quartiles(name)
    return [rounded(1e6 / high), rounded(1e6 / low)]


def measure_cell(
    builds: Mapping[str, Callable[[torch.Tensor], Any]], sizes: Mapping[str, int], x: torch.Tensor, rounds: int
) -> tuple[Comparison, dict[str, str]]:
    """All contenders for one input x [M, K], and why some of the others' refuse it.

    sizes: bytes of one copy of each one's weight. Raises what one of ours, or bf16, raises.
    """
    turns, refused = {}, {}
    for name, build in builds.items():
        copies = max(1, math.ceil(POOL_BYTES / sizes[name]))
        try:
            turns[name] = captured(list(itertools.islice(build(x), copies)))
        except Exception as error:
            if must_run(name):
                raise
            refused[name] = why(error)
    return interleave(turns, rounds, "bf16"), refused


# --- report -----------------------------------------------------------------------------------------------------------
def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The report for a terminal."""
    view = Table(title="GPU linear layers (× bf16: median of paired ratios to cuBLAS, >1 = faster)")
    for name in ("layer", "M", "contender", "µs", "× bf16", "GB/s", "TOP/s", "of ceiling", "kernel"):
        view.add_column(name, justify="left" if name in ("layer", "contender", "kernel") else "right")
    previous: tuple[str, int] | None = None
    for line in rows:
        case = (line["layer"], line["M"])
        if previous not in (None, case):
            view.add_section()
        head = (line["layer"], str(line["M"])) if previous != case else ("", "")
        previous = case
        figures = (f"{line['median_us']:.1f}", f"{line['ratio_to_bf16']:.2f}", f"{line['gb_s']:.0f}")
        rest = (f"{line['top_s']:.1f}", f"{100 * line['fraction']:.0f} %", line["kernel"])
        view.add_row(*head, line["contender"], *figures, *rest)
    return view


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    model: Annotated[str, typer.Option(help="Layers of Llama-3 8B, 70B or both.")] = "8B",
    layer: Annotated[list[str] | None, typer.Option(help="Only this layer, such as gate_up, repeatable.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(min=1, help="M, repeatable [1 … 8192].")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds a cell.")] = 7,
    contender: Annotated[list[str] | None, typer.Option(help="Contenders, repeatable; bf16 always runs [all].")] = None,
    check_only: Annotated[bool, typer.Option(help="Compare with the reference, measure nothing.")] = False,
    check: Annotated[bool, typer.Option(help="Compare with the reference before measuring.")] = True,
) -> None:
    """Check the CUDA linear ops, measure them and print the table."""
    reason = missing()
    if reason is not None:
        print(reason, file=sys.stderr)
        raise typer.Exit(NO_GPU)
    # Only here: they need vLLM or the CUDA library.
    from benchmarks import gpu_contenders
    from benchmarks.gpu_checks import cases, failures
    from resq_vllm.quantized_linear import cuda_kernel

    console = wide_console()
    properties = torch.cuda.get_device_properties(0)
    if check or check_only:
        wrong = failures(properties.major)
        for sentence in wrong:
            console.print(sentence, highlight=False)
        compared = len(list(cases(properties.major)))
        said = f"{properties.name}: {len(wrong)} of {compared} cases differ from the reference"
        console.print(said, highlight=False, soft_wrap=True)
        if wrong or check_only:
            raise typer.Exit(1 if wrong else 0)

    shapes = {"8B": gpu_contenders.LLAMA_8B, "70B": gpu_contenders.LLAMA_70B}
    if model not in (*shapes, "both"):
        raise typer.BadParameter(f"--model {model} is none of 8B, 70B, both.")
    chosen = [s for name, group in shapes.items() if model in (name, "both") for s in group]
    chosen = [s for s in chosen if not layer or s.name.split()[1] in layer]
    known = gpu_contenders.contenders()
    unknown = [name for name in contender or () if name not in known]
    if unknown:
        raise typer.BadParameter(f"--contender {', '.join(unknown)} is not known; known are {', '.join(known)}.")
    ceilings = measured_ceilings()
    console.print(f"measured ceilings: { {k: f'{v:.3g}' for k, v in ceilings.items()} }", highlight=False)
    rows: list[dict[str, Any]] = []
    unavailable: dict[str, str] = {}
    for shape in chosen:
        builds: dict[str, Any] = {}
        for name, entry in known.items():
            if (contender and name not in (*contender, "bf16")) or name in unavailable:
                continue
            try:
                builds[name] = entry.build(shape)
            except Exception as error:
                if must_run(name):
                    raise
                unavailable[name] = why(error)
        sizes = {name: known[name].weight_bytes(shape) for name in builds}
        plan = shape.plan()
        for count in tokens or TOKENS:
            if shape.site == "head" and count > HEAD_TOKENS:
                continue
            x = torch.randn(count, shape.columns, device="cuda", dtype=torch.bfloat16)
            measured, refused = measure_cell(builds, sizes, x, rounds)
            unavailable |= {f"{name} ({shape.name}, M = {count})": said for name, said in refused.items()}
            kernel = cuda_kernel(count, shape.outputs, plan.flat_segments(), plan.group_bits, 4)
            for name in measured.rounds:
                seconds, work = 1 / measured.median(name), 2.0 * count * shape.outputs * shape.columns
                rows.append(
                    {
                        "layer": shape.name,
                        "M": count,
                        "N": shape.outputs,
                        "K": shape.columns,
                        "contender": name,
                        "median_us": rounded(1e6 * seconds),
                        "quartiles_us": quartiles_us(measured, name),
                        "ratio_to_bf16": rounded(measured.ratio(name)),
                        "gb_s": rounded(sizes[name] / seconds / 1e9),
                        "top_s": rounded(work / seconds / 1e12),
                        "fraction": rounded(fraction(ceilings, known[name].arithmetic, sizes[name], work, seconds), 3),
                        "kernel": kernel if name.startswith("resq") else "",
                    }
                )
            torch.cuda.empty_cache()
        if json_file is not None:  # after every layer: a run that is cut off leaves what it measured
            device = {"name": properties.name, "processors": properties.multi_processor_count}
            write_report(
                json_file, rows, device=device, ceilings=ceilings, unavailable=unavailable, pool_bytes=POOL_BYTES
            )
    console.print(table(rows))
    for name, sentence in unavailable.items():
        console.print(f"{name} is not measured: {sentence}", highlight=False)


if __name__ == "__main__":
    typer.run(main)
