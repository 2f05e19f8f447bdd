"""Whether the CUDA linear ops equal the reference bit for bit on this GPU: every kernel, small shapes and edges."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.gpu_contenders import OurWeight, Shape
from resq_vllm import ops, reference
from resq_vllm.quantized_linear import KERNELS, linear_integer, linear_quantized, runs_on

# (site, N, K): edges of tiles, every kind of plan.
SHAPES = (("qkv", 272, 1024), ("o", 150, 1024), ("down", 130, 2048), ("head", 257, 512), ("gate_up", 4096, 4096))
TOKENS = (1, 7, 16, 33, 130, 300)


def cases(major: int) -> Iterator[tuple[str, int, int, int, int]]:
    """(kernel, splits, tokens, index of SHAPES, seed)."""
    seed = 0
    for kernel, (most, splits) in KERNELS.items():
        for shape in range(len(SHAPES)):
            if not runs_on(kernel, major, Shape("check", *SHAPES[shape]).plan()):
                continue
            for tokens in TOKENS:
                if most and tokens > most:
                    continue
                for share in (1, 2, 3) if splits else (1,):
                    seed += 1
                    yield kernel, share, tokens, shape, seed


def expected(weight: OurWeight, quantized: tuple[torch.Tensor, torch.Tensor, torch.Tensor], x: torch.Tensor) -> tuple:
    """Integers and y of the reference, from x's own codes in column order, on x's device.

    The reference multiplies in float64, where sums of these integers are exact on every device.
    """
    codes, scale, zero = ops.quantize_activation(x, weight.segments, weight.group_bits)
    assert torch.equal(scale, quantized[1]), "quantize_pack and quantize_activation disagree about scales"
    assert torch.equal(zero, quantized[2]), "quantize_pack and quantize_activation disagree about zero points"
    integers = reference.linear_integer(codes, zero, weight.low, weight.high, weight.plan)
    y = torch.zeros(len(x), weight.shape.outputs, device=x.device)
    for run, integer in zip(weight.plan.runs, integers, strict=True):
        y = y + integer.float() * (scale[:, run.group : run.group + 1] * weight.scales[run.scale_row])
    return integers, y.to(x.dtype)


def failures(major: int) -> list[str]:
    """One sentence for every case that differs from the reference."""
    weights = [OurWeight(Shape("check", site, n, k), seed=i) for i, (site, n, k) in enumerate(SHAPES)]
    known: dict[tuple[int, int], tuple] = {}
    wrong = []
    for kernel, splits, tokens, index, seed in cases(major):
        weight = weights[index]
        if (index, tokens) not in known:
            g = torch.Generator("cuda").manual_seed(seed)
            x = torch.randn(tokens, weight.shape.columns, device="cuda", dtype=torch.bfloat16, generator=g)
            quantized = weight.quantized(x)
            known[index, tokens] = (quantized, *expected(weight, quantized, x))
        quantized, integers, y = known[index, tokens]
        own = (weight.packed, weight.scales, weight.sums)
        plan = (weight.shape.outputs, weight.segments, weight.group_bits)
        ours = linear_quantized(quantized, *own, None, *plan, torch.bfloat16, kernel=kernel, splits=splits)
        exact = linear_integer(quantized, *own, *plan, len(weight.plan.runs), kernel=kernel, splits=splits)
        differing = int((exact != integers).sum())
        if differing or not torch.equal(ours, y):
            wrong.append(
                f"{kernel} x{splits}, {SHAPES[index]}, M = {tokens}: {differing} integers and "
                f"{int((ours != y).sum())} outputs differ"
            )
    return wrong
