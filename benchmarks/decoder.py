"""`python -m benchmarks.decoder`: a model's decoder layers in a decode step, as one op and op by op, without vLLM.

Random weights of a model's sizes, one new token a sequence. `stack` is what vLLM's graph runs
(resq_vllm.decoder_stack), `ops` the same layers by RoPE, kv_write_attention and between_attentions, bit for bit equal.
Where the kernels are those of AVX512-VNNI, `stack` runs with both ways to read weights. A step reads more than the
caches hold, so nothing else need pass through them. `ratio` is the median of paired ratios to `ops`, above 1 where
faster.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from benchmarks.ceilings import measured_ceilings
from benchmarks.dummy_model import SHAPES, Shape
from benchmarks.kernel_process import restart
from benchmarks.linear_contenders import resq_plan
from benchmarks.machine import machine, usable_cores
from benchmarks.report import rounded, wide_console, write_report
from benchmarks.turns import measure, median_ms
from resq_vllm import fused_linear, ops
from resq_vllm.decoder_stack import DecoderStack
from resq_vllm.formats.kv_layout import KVLayout
from resq_vllm.formats.metadata import SiteName
from resq_vllm.hadamard import hadamard_matrix

BLOCK = 16
EPSILON = 1e-5
READINGS = ("avx512_vnni:side_by_side", "avx512_vnni:in_order")
Result = tuple[torch.Tensor, torch.Tensor]


def random_layer(site: SiteName, outputs: int, columns: int) -> fused_linear.Layer:
    """A packed layer of a site's default recipe with random codes."""
    plan, low_bits = resq_plan(site, columns)
    low, high = plan.part_columns
    codes = torch.randint(0, 256, (outputs, low * low_bits // 8), dtype=torch.uint8)
    stored = codes if low_bits == 4 else codes.view(torch.int8)
    eight = torch.randint(-127, 128, (outputs, high), dtype=torch.int8) if high else None
    packed, sums = ops.pack_weight(stored, eight, low_bits, outputs, plan.flat_segments())
    words = ops.plan_tensor(plan.flat_segments(), list(plan.group_bits), plan.hadamard_groups)
    matrix = hadamard_matrix(plan.hadamard_k).float() if plan.hadamard_k > 1 else None
    return packed, torch.rand(2, outputs) * 1e-3, sums, None, words, matrix


class Step:
    """The layers of a shape and a batch of `streams` sequences with `context` tokens, the last of them new."""

    def __init__(self, shape: Shape, streams: int, context: int) -> None:
        torch.manual_seed(0)
        hidden, hd = shape.hidden_size, shape.head_dim
        self.heads, self.kv_heads, self.hd = shape.num_attention_heads, shape.num_key_value_heads, hd
        width = (self.heads + 2 * self.kv_heads) * hd
        norm = torch.ones(hidden, dtype=torch.bfloat16)
        self.layers: list[tuple[Any, ...]] = []
        for i in range(shape.num_hidden_layers):
            o = random_layer("o", hidden, self.heads * hd)
            up = random_layer("gate_up", 2 * shape.intermediate_size, hidden)
            down = random_layer("down", hidden, shape.intermediate_size)
            after = (norm, EPSILON, random_layer("qkv", width, hidden)) if i + 1 < shape.num_hidden_layers else ()
            self.layers.append((o, norm, EPSILON, up, down, *after))
        layout = KVLayout(hd, hd // 8, 4)
        self.layout = layout.high, layout.low_bits, -1
        blocks = -(-context // BLOCK)
        pages = streams * blocks, self.kv_heads, BLOCK, layout.bytes_per_token
        self.caches = [torch.zeros(pages, dtype=torch.uint8) for _ in self.layers]
        self.rotations = [torch.linalg.qr(torch.randn(hd, hd))[0].contiguous() for _ in self.layers]
        self.table = torch.randperm(streams * blocks).int().view(streams, blocks)
        last = context - 1
        self.slots = self.table[:, last // BLOCK].long() * BLOCK + last % BLOCK
        self.lens = torch.full((streams,), context, dtype=torch.int32)
        self.starts = torch.arange(streams + 1, dtype=torch.int32)
        self.positions = torch.full((streams,), last)
        angles = torch.outer(torch.arange(context).float(), 10000.0 ** -torch.linspace(0, 1, hd // 2))
        self.cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1).bfloat16()
        self.qkv, self.residual = (torch.randn(streams, n).bfloat16() for n in (width, hidden))

    @property
    def weights(self) -> list[torch.Tensor | None]:
        """Of all layers, as DecoderStack takes them."""
        parts = (part for layer in self.layers for part in layer if not isinstance(part, float))
        return [t for part in parts for t in (part if isinstance(part, tuple) else (part,))]

    def stack(self) -> Callable[[], Result]:
        """All layers in one call."""
        count = len(self.layers)
        epsilons, scales = [EPSILON] * (2 * count - 1), [self.hd**-0.5] * count
        kept = (self.cos_sin, self.weights, self.caches, self.rotations)
        stack = DecoderStack(*kept, epsilons, scales, self.layout * count, self.heads)
        batch = self.slots, self.table, self.lens, self.starts
        return lambda: stack(self.qkv, self.residual, self.positions, *batch)

    def ops(self) -> Result:
        """Layer by layer."""
        x, residual = self.qkv.clone(), self.residual
        for layer, cache, rotation in zip(self.layers, self.caches, self.rotations, strict=True):
            ops.rope(x, self.positions, self.cos_sin, self.heads + self.kv_heads)
            q, k, v = x.unflatten(1, (-1, self.hd)).split([self.heads, self.kv_heads, self.kv_heads], dim=1)
            out = torch.empty(len(x), self.heads, self.hd, dtype=x.dtype)
            batch = self.slots, self.table, self.lens, self.starts, rotation
            ops.kv_write_attention(q, k, v, cache, out, *batch, self.hd**-0.5, *self.layout)
            if len(layer) == 5:
                return fused_linear.decoder_mlp(out.flatten(1), residual, *layer)
            x, residual = fused_linear.between_attentions(out.flatten(1), residual, *layer)
        raise AssertionError("the last layer ends in its MLP")


def contenders(step: Step) -> dict[str, Callable[[], Result]]:
    """What is measured: `ops`, `stack`, and `stack` with each way to read weights where there are two."""
    stack = step.stack()

    def forced(name: str) -> Result:
        ops.set_isa(name)
        try:
            return stack()
        finally:
            ops.set_isa("avx512_vnni")

    calls = {"ops": step.ops, "stack": stack}
    if ops.isa() == "avx512_vnni":
        calls |= {f"stack, {name.partition(':')[2]}": lambda name=name: forced(name) for name in READINGS}  # type: ignore[misc]
    return calls


def measure_step(shape: Shape, streams: int, context: int, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """One line of the report a contender. gb_s: bytes of all tensors of the layers over time, in 10^9 a second."""
    step = Step(shape, streams, context)
    measured = measure({name: [call] for name, call in contenders(step).items()}, rounds, seconds, ("ops",))
    size = sum(t.numel() * t.element_size() for t in step.weights if t is not None)
    return [
        {
            "streams": streams,
            "context": context,
            "contender": name,
            "median_ms": rounded(median_ms(measured, name)),
            "ratio": rounded(measured.ratio(name)),
            "gb_s": rounded(size / median_ms(measured, name) / 1e6),
            "rounds": len(measured.rounds[name]),
        }
        for name in measured.rounds
    ]


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """The report for a terminal."""
    view = Table(title="Decoder layers of a decode step (ratio: median of paired ratios to ops, >1 = faster)")
    for name in ("streams", "context", "contender", "ms", "× ops", "GB/s"):
        view.add_column(name, justify="left" if name == "contender" else "right")
    for line in rows:
        figures = (f"{line['median_ms']:.3f}", f"{line['ratio']:.3f}", f"{line['gb_s']:.1f}")
        view.add_row(str(line["streams"]), str(line["context"]), line["contender"], *figures)
    return view


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads, each on a core of its own [all cores].")] = None,
    shape: Annotated[str, typer.Option(help=f"Sizes of the model: {', '.join(SHAPES)}.")] = "1b",
    streams: Annotated[list[int] | None, typer.Option(min=1, help="Sequences, repeatable [1].")] = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens of every sequence.")] = 96,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds at most.")] = 100,
    seconds: Annotated[float, typer.Option(min=0.0, help="Seconds a case, after five rounds.")] = 20.0,
) -> None:
    """Measure a decode step's decoder layers and print the table."""
    if shape not in SHAPES:
        raise typer.BadParameter(f"--shape {shape} is not known; known are {', '.join(SHAPES)}.")
    try:
        restart(threads or len(usable_cores()))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    console = wide_console()
    used = f"{torch.get_num_threads()} threads; our kernels: {ops.isa()}"
    console.print(f"{machine().sentence()}; {used}", highlight=False)
    ceilings = measured_ceilings()
    console.print(f"measured ceilings: {ceilings.to_dict()}", highlight=False)
    rows = [line for count in streams or [1] for line in measure_step(SHAPES[shape], count, context, rounds, seconds)]
    console.print(table(rows))
    if json_file is not None:
        facts = {"threads": torch.get_num_threads(), "isa": ops.isa(), "shape": shape}
        write_report(json_file, rows, **facts, ceilings=ceilings.to_dict())


if __name__ == "__main__":
    typer.run(main)
