"""What the kernel tests share: the instruction sets of this machine, and how much float error is allowed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from resq_vllm import ops, reference
from resq_vllm.errors import ResQError
from resq_vllm.formats.kv_layout import KVLayout
from resq_vllm.formats.plan import LinearPlan
from resq_vllm.formats.weights import pack_int4
from resq_vllm.hadamard import hadamard_matrix


def _of_this_machine(*names: str) -> list[str]:
    found = []
    for name in names:
        try:
            ops.set_isa(name)
        except ResQError:
            continue
        found.append(name)
    ops.set_isa("")
    return found


ISAS = _of_this_machine("amx_int8", "avx512_vnni", "avx2_vnni", "avx2", "portable")
# How few tokens read weights depends on the processor's make; every machine tests both ways.
READINGS = _of_this_machine("avx512_vnni:side_by_side", "avx512_vnni:in_order")


@contextmanager
def running(isa: str) -> Iterator[None]:
    ops.set_isa(isa)
    try:
        yield
    finally:
        ops.set_isa("")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_identical(ours: Any, expected: Any, isa: str) -> None:
    """Tensors (or tuples of them) equal bit for bit, NaN where NaN is expected."""
    torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{isa}: {text}")


def assert_no_worse(ours: torch.Tensor, torch_result: torch.Tensor, exact: torch.Tensor, floor: float = 1e-7) -> None:
    """Largest error against ``exact`` (float64) at most twice that of torch in the same precision.

    ``floor``: what is forgiven beside it, relative to the largest exact value.
    """
    if not exact.numel():
        assert ours.shape == exact.shape
        return
    assert ours.dtype == torch_result.dtype
    error, torch_error = (float((y.double() - exact).abs().max()) for y in (ours, torch_result))
    assert error <= 2 * torch_error + floor * float(exact.abs().max()), f"error {error}, torch's {torch_error}"


class Weights:
    """Random weights for a plan: codes as the reference takes them, packed as the op does."""

    def __init__(self, plan: LinearPlan, outputs: int, low_bits: int, seed: int) -> None:
        g = generator(seed)
        low, high = plan.part_columns
        limit = 8 if low_bits == 4 else 128
        self.plan = plan
        self.outputs = outputs
        # Made here: torch.compile on Python 3.11 cannot trace the plan's cached properties.
        self.arguments = plan_arguments(plan)
        self.weight_group = plan.weight_group
        self.words = ops.plan_tensor(*self.arguments[:3], plan.weight_group)
        self.low = torch.randint(-limit, limit, (outputs, low), generator=g).to(torch.int8)
        self.high = torch.randint(-128, 128, (outputs, high), generator=g).to(torch.int8)
        self.scales = torch.rand(plan.scale_rows, outputs, generator=g) * 0.1
        stored = pack_int4(self.low) if low_bits == 4 else self.low
        self.packed, self.sums = ops.pack_weight(
            stored if low else None,
            self.high if high else None,
            low_bits,
            outputs,
            plan.flat_segments(),
            plan.weight_group,
        )

    def reference(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        low_scale = self.scales[:-1].T if self.plan.weight_group else self.scales[0]
        return reference.linear(x, self.low, self.high, low_scale, self.scales[-1], self.plan, bias)

    def apply(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return ops.linear(
            x, self.packed, self.scales, self.sums, bias, self.outputs, *self.arguments, self.weight_group
        )

    def apply_planned(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return ops.linear_planned(x, self.packed, self.scales, self.sums, bias, self.words, self.arguments[-1])


def plan_arguments(plan: LinearPlan) -> tuple[list[int], list[int], int, torch.Tensor | None]:
    k = plan.hadamard_k
    dense = hadamard_matrix(k).float() if k > 1 else None
    return plan.flat_segments(), list(plan.group_bits), plan.hadamard_groups, dense


def random_cache(layout: KVLayout, blocks: int, heads: int, tokens: int, seed: int) -> torch.Tensor:
    """uint8 [blocks, heads, tokens, C]: random codes and zero points with float16 scales of ordinary size."""
    g = generator(seed)
    cache = torch.randint(0, 256, (blocks, heads, tokens * layout.bytes_per_token), generator=g).to(torch.uint8)
    at = layout.planes(tokens)
    scales = cache[..., at.scales : at.zeros].view(torch.float16).view(blocks, heads, 2, layout.parts, tokens)
    scales.copy_(torch.rand(scales.shape, generator=g) * 0.2 + 0.01)
    if layout.parts == 2:
        scales[..., 1, :] *= 1 / 16  # 8-bit codes reach 16 times as far as 4-bit ones
    zeros = cache[..., at.zeros :].view(blocks, heads, 2, layout.parts, tokens)
    zeros[..., 0, :] = zeros[..., 0, :] % 16
    return cache.view(blocks, heads, tokens, layout.bytes_per_token)
