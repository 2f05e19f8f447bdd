"""`python -m benchmarks.gpu_attention`: attention over the KV cache on a GPU, ours beside vLLM's FlashAttention.

Contenders take turns, each as a CUDA graph of calls over rotating pages, so that the L2 cache is cold. `layer_us`: the
write of the new tokens (with the query's rotation or quantization) and attention, as vLLM launches them;
`attention_us`: attention alone; `…_quartiles_us`: of the rounds. `…_ratio_to_bf16`: median of paired ratios to
FlashAttention over a bf16 cache. That ours is right is checked by the tests (`pytest tests/resq_vllm/gpu_kv`, which use
the GPU where there is one). Needs a GPU: no figure is written without one.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from benchmarks.gpu_attention_contenders import LLAMA_1B, LLAMA_8B, Case, Heads, contenders
from benchmarks.gpu_linear import NO_GPU, captured, must_run, quartiles_us, why
from benchmarks.pairs import Comparison, interleave
from benchmarks.report import rounded, wide_console, write_report

MODELS = {"8B": LLAMA_8B, "1B": LLAMA_1B}
BATCHES = (1, 16, 64)
CONTEXTS = (1024, 4096, 8192, 32768)
# A prompt is attended in chunks of at most so many tokens, as vLLM schedules it; the context is before and in it.
CHUNK = 8192
# Tokens of a cell's largest cache in bf16: 17 GB at 8 kv heads of 128 dims.
MOST_TOKENS = 1 << 22


def missing() -> str | None:
    """Why nothing can be measured here, in one sentence."""
    if not torch.cuda.is_available():
        return (
            "benchmarks.gpu_attention needs an NVIDIA GPU of compute capability 8.0 or later, and torch sees none here."
        )
    if torch.cuda.get_device_capability() < (8, 0):
        name = torch.cuda.get_device_name()
        return f"benchmarks.gpu_attention needs a GPU of compute capability 8.0 or later, which {name} is not."
    return None


def cases(batches: Sequence[int], contexts: Sequence[int]) -> list[Case]:
    """Decodes of every batch and context, and one prompt's last chunk of every context."""
    decodes = [Case("decode", b, c, 1) for b, c in itertools.product(batches, contexts) if b * c <= MOST_TOKENS]
    return decodes + [Case("prefill", 1, c, min(c, CHUNK)) for c in contexts]


@dataclass(frozen=True)
class Measured:
    """Calls a second of every contender."""

    layer: Comparison
    attention: Comparison


def measure_cell(names: Sequence[str], case: Case, heads: Heads, rounds: int) -> tuple[Measured, dict[str, str]]:
    """All contenders on one case, and why some of the others' refuse it.

    Raises what bf16 or one of ours raises.
    """
    layer, attention, refused = {}, {}, {}
    for name in names:
        try:
            calls = contenders()[name].calls(case, heads)
            layer[name], attention[name] = captured(calls.layer), captured(calls.attention)
        except Exception as error:
            if must_run(name):
                raise
            refused[name] = why(error)
    return Measured(interleave(layer, rounds, "bf16"), interleave(attention, rounds, "bf16")), refused


def rows_of(case: Case, heads: Heads, measured: Measured) -> list[dict[str, Any]]:
    """The report's rows of one cell; kv_gb_s and tflop_s are of attention alone."""
    rows = []
    for name in measured.layer.rounds:
        seconds = 1 / measured.attention.median(name)
        read = case.kv_bytes(contenders()[name].bytes_per_token(heads), heads)
        rows.append(
            {
                "model": heads.name,
                "phase": case.phase,
                "batch": case.sequences,
                "context": case.context,
                "queries": case.queries,
                "contender": name,
                "layer_us": rounded(1e6 / measured.layer.median(name)),
                "layer_quartiles_us": quartiles_us(measured.layer, name),
                "layer_ratio_to_bf16": rounded(measured.layer.ratio(name)),
                "attention_us": rounded(1e6 * seconds),
                "attention_quartiles_us": quartiles_us(measured.attention, name),
                "attention_ratio_to_bf16": rounded(measured.attention.ratio(name)),
                "kv_gb_s": rounded(read / seconds / 1e9),
                "tflop_s": rounded(case.work(heads) / seconds / 1e12),
            }
        )
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The report for a terminal."""
    view = Table(title="GPU attention (× bf16: median of paired ratios to FlashAttention over bf16, >1 = faster)")
    left = ("model", "phase", "contender")
    figures = ("layer µs", "× bf16", "attention µs", "× bf16", "KV GB/s", "TFLOP/s")
    for name in ("model", "phase", "batch", "context", "contender", *figures):
        view.add_column(name, justify="left" if name in left else "right")
    previous: tuple[str, ...] | None = None
    for line in rows:
        head = (line["model"], line["phase"], str(line["batch"]), str(line["context"]))
        if previous not in (None, head):
            view.add_section()
        shown = head if previous != head else ("",) * 4
        layer = (f"{line['layer_us']:.1f}", f"{line['layer_ratio_to_bf16']:.2f}")
        attention = (f"{line['attention_us']:.1f}", f"{line['attention_ratio_to_bf16']:.2f}")
        rest = (f"{line['kv_gb_s']:.0f}", f"{line['tflop_s']:.1f}")
        view.add_row(*shown, line["contender"], *layer, *attention, *rest)
        previous = head
    return view


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    model: Annotated[str, typer.Option(help="Heads of Llama-3 8B, of Llama-3.2 1B, or both.")] = "both",
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Sequences of a decode, repeatable [1 16 64].")] = None,
    context: Annotated[
        list[int] | None, typer.Option(min=1, help="Tokens of a context, repeatable [1k … 32k].")
    ] = None,
    contender: Annotated[list[str] | None, typer.Option(help="Contenders, repeatable; bf16 always runs [all].")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds a cell.")] = 7,
) -> None:
    """Measure attention over the KV cache on a GPU and print the table."""
    reason = missing()
    if reason is not None:
        print(reason, file=sys.stderr)
        raise typer.Exit(NO_GPU)
    if model not in (*MODELS, "both"):
        raise typer.BadParameter(f"--model {model} is none of 8B, 1B, both.")
    known = contenders()
    unknown = [name for name in contender or () if name not in known]
    if unknown:
        raise typer.BadParameter(f"--contender {', '.join(unknown)} is not known; known are {', '.join(known)}.")
    names = [name for name in known if not contender or name in (*contender, "bf16")]
    properties = torch.cuda.get_device_properties(0)
    device = {"name": properties.name, "processors": properties.multi_processor_count}
    console = wide_console()
    rows: list[dict[str, Any]] = []
    unavailable: dict[str, str] = {}
    for heads in (heads for name, heads in MODELS.items() if model in (name, "both")):
        for case in cases(batch or BATCHES, context or CONTEXTS):
            measured, refused = measure_cell(names, case, heads, rounds)
            at = f"{heads.name} {case.phase}, batch {case.sequences}, context {case.context}"
            unavailable |= {f"{name} ({at})": said for name, said in refused.items()}
            rows += rows_of(case, heads, measured)
            torch.cuda.empty_cache()
            if json_file is not None:  # after every cell: a run that is cut off leaves what it measured
                write_report(json_file, rows, device=device, unavailable=unavailable)
    console.print(table(rows))
    for name, sentence in unavailable.items():
        console.print(f"{name} is not measured: {sentence}", highlight=False)


if __name__ == "__main__":
    typer.run(main)
