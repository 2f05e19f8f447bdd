"""`python -m benchmarks.gpu_quantize`: the quantize ops on a GPU beside the op whose output they quantize.

Norm and quantization in one launch beside RMSNorm alone and beside the two in turn; the same for SiLU·mul with the
online Hadamard; `fast_hadamard_transform`, where it is installed, on the power-of-two factor. CUDA graphs, inputs in
rotation through more memory than the L2 cache holds.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.gpu_linear import GRAPH_CALLS, NO_GPU, POOL_BYTES, captured, missing, quartiles_us, why
from benchmarks.pairs import interleave
from benchmarks.report import rounded, write_report
from resq_vllm import fused, ops
from resq_vllm.formats.metadata import LinearSite
from resq_vllm.formats.plan import linear_plan
from resq_vllm.hadamard import hadamard_matrix

TOKENS = (1, 16, 64, 1024, 8192)
Contender = Callable[[torch.Tensor], object]


def norm_contenders(columns: int) -> dict[str, Contender]:
    """Of one row width; the first is what the others are compared with."""
    plan = linear_plan(LinearSite(low=columns * 7 // 8, high=columns // 8), columns, 128)
    weight = torch.ones(columns, device="cuda", dtype=torch.bfloat16)
    what = (plan.flat_segments(), list(plan.group_bits))
    found: dict[str, Contender] = {"rms_norm": lambda x: torch.nn.functional.rms_norm(x, (columns,), weight, 1e-5)}
    try:
        import vllm._custom_ops as vllm_ops

        vllm_ops.rms_norm(torch.empty(1, columns, device="cuda", dtype=torch.bfloat16), *_one_row(columns, weight))
        found = {"rms_norm": lambda x: _into(lambda out: vllm_ops.rms_norm(out, x, weight, 1e-5), x)}
    except Exception as error:
        print(f"vLLM's RMSNorm is not measured, torch's is: {why(error)}", file=sys.stderr)
    alone = found["rms_norm"]
    found["rms_norm_quantize"] = lambda x: fused.rms_norm_quantize(x, None, weight, 1e-5, *what)
    found["quantize_pack"] = lambda x: fused.quantize_pack(x, *what)

    def in_turn(x: torch.Tensor) -> object:
        alone(x)
        return fused.quantize_pack(x, *what)

    found["rms_norm, quantize_pack"] = in_turn
    return found


def _one_row(columns: int, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
    return torch.zeros(1, columns, device="cuda", dtype=torch.bfloat16), weight, 1e-5


def _into(call: Callable[[torch.Tensor], object], x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    call(out)
    return out


def down_contenders(columns: int) -> dict[str, Contender]:
    """Of an FFN of ``columns``; inputs are [gate | up]."""
    plan = linear_plan(LinearSite(low=columns, high=0, scales="block", hadamard_groups=8), columns, 128)
    dense = hadamard_matrix(plan.hadamard_k).float().cuda() if plan.hadamard_k > 1 else None
    what = (plan.flat_segments(), list(plan.group_bits), 8, dense)
    found: dict[str, Contender] = {
        "silu_mul": lambda x: torch.nn.functional.silu(x[:, :columns]) * x[:, columns:],
        "silu_mul_quantize": lambda x: fused.silu_mul_quantize(x, *what),
        "quantize_pack": lambda x: fused.quantize_pack(x[:, :columns], *what),
        "hadamard": lambda x: ops.hadamard(x[:, :columns].contiguous(), 8, dense),
    }
    try:
        hadamard_transform = importlib.import_module("fast_hadamard_transform").hadamard_transform
    except ImportError:
        print("fast_hadamard_transform is not installed, and not measured", file=sys.stderr)
    else:
        width = columns // 8 // plan.hadamard_k
        found["fast_hadamard_transform of 2^m"] = lambda x: hadamard_transform(
            x[:, :columns].reshape(-1, width), width**-0.5
        )
    return found


def measure(builds: Mapping[str, Contender], tokens: int, columns: int, rounds: int) -> list[dict[str, Any]]:
    """A row of figures for every contender."""
    size = 2 * tokens * columns
    copies = max(1, min(math.ceil(POOL_BYTES / size), GRAPH_CALLS))
    inputs = [torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
    turns = {
        name: captured([lambda x=x, call=call: call(x) for x in inputs], max(copies, GRAPH_CALLS))  # type: ignore[misc]
        for name, call in builds.items()
    }
    first = next(iter(builds))
    measured = interleave(turns, rounds, first)
    return [
        {
            "columns": columns,
            "M": tokens,
            "contender": name,
            "median_us": rounded(1e6 / measured.median(name)),
            "quartiles_us": quartiles_us(measured, name),
            f"time_of_{first}": rounded(1 / measured.ratio(name)),
            "gb_s_read": rounded(size * measured.median(name) / 1e9),
        }
        for name in builds
    ]


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(min=1, help="M, repeatable.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds a cell.")] = 7,
) -> None:
    """Measure the quantize ops."""
    reason = missing()
    if reason is not None:
        print(reason, file=sys.stderr)
        raise typer.Exit(NO_GPU)
    rows = []
    for columns, builds, width in (
        (4096, norm_contenders(4096), 4096),
        (8192, norm_contenders(8192), 8192),
        (14336, down_contenders(14336), 2 * 14336),
        (11008, down_contenders(11008), 2 * 11008),
    ):
        for count in tokens or TOKENS:
            cell = measure(builds, count, width, rounds)
            for row in cell:
                print(columns, row)
            rows += cell
            torch.cuda.empty_cache()
            if json_file is not None:  # after every cell: a run that is cut off leaves what it measured
                write_report(json_file, rows, device={"name": torch.cuda.get_device_name(0)}, pool_bytes=POOL_BYTES)


if __name__ == "__main__":
    typer.run(main)
