"""A linear layer on activations that are quantized already, on CUDA: the GEMM without its own quantize launch.

The codes come from :mod:`resq_vllm.fused`; the integer part and the float sums are those of ``reference.linear``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from resq_vllm import ops  # noqa: F401  (registers the ops)
from resq_vllm.formats.plan import HIGH, LinearPlan

# The kernels of csrc/cuda/gemm_table.h: the most tokens they take (0: any number), and whether CTAs may share a tile.
KERNELS = {
    "decode_m8_n32": (8, True),
    "decode_m8_n64": (8, True),
    "decode_m16_n32": (16, True),
    "decode_m16_n64": (16, True),
    "tiled_m32_n128": (0, False),
    "tiled_m32_n128_split": (0, True),
    "tiled_m64_n128_split": (0, True),
    "tiled_m128_n128_split": (0, True),
    "tiled_m64_n128": (0, False),
    "tiled_m128_n128": (0, False),
    "tiled_m64_n128_s4": (0, False),
    "tiled_m128_n128_s4": (0, False),
    "wgmma_m64_n128": (0, False),
    "wgmma_m128_n128": (0, False),
}


def runs_on(kernel: str, major: int, plan: LinearPlan) -> bool:
    """Whether a chip of compute capability ``major``.x has the kernel's instructions, and the plan's codes fit them."""
    if kernel.startswith("wgmma"):
        return major == 9
    four_bits = all(run.part == HIGH or plan.group_bits[run.group] == 4 for run in plan.runs)
    return not kernel.endswith("s4") or (major == 8 and four_bits)


def linear_quantized(
    quantized: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    packed: torch.Tensor,
    scales: torch.Tensor,
    wsum: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    segments: Sequence[int],
    group_bits: Sequence[int],
    dtype: torch.dtype,
    weight_group: int = 0,
    kernel: str = "",
    splits: int = 0,
) -> torch.Tensor:
    """y [M, N] of ``dtype`` from codes, scale and zero point of one of the ops of resq_vllm.fused (not as nibbles).

    packed, scales, wsum, bias, n, segments, group_bits, weight_group: as in ops.linear. kernel, splits: the name of a
    kernel and its CTAs a tile, for measurements; "" and 0 are the table's choice.
    Raises RuntimeError with one sentence.
    """
    return torch.ops.resq.linear_quantized(
        *quantized, packed, scales, wsum, bias, n, segments, group_bits, weight_group, dtype, -1, kernel, splits
    )


def linear_integer(
    quantized: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    packed: torch.Tensor,
    scales: torch.Tensor,
    wsum: torch.Tensor,
    n: int,
    segments: Sequence[int],
    group_bits: Sequence[int],
    runs: int,
    weight_group: int = 0,
    kernel: str = "",
    splits: int = 0,
) -> torch.Tensor:
    """The exact integers of every run, int32 [R, M, N], from the same kernels: what tests compare bit for bit."""
    arguments = (*quantized, packed, scales, wsum, None, n, segments, group_bits, weight_group, torch.float32)
    outputs = [torch.ops.resq.linear_quantized(*arguments, run, kernel, splits) for run in range(runs)]
    return torch.stack([y.view(torch.int32) for y in outputs])


def cuda_kernel(
    tokens: int,
    n: int,
    segments: Sequence[int],
    group_bits: Sequence[int],
    low_bits: int,
    device: int = 0,
    weight_group: int = 0,
) -> str:
    """The kernel that ``tokens`` rows get on a CUDA device, with its CTAs a tile: "decode_m8_n32 x2"."""
    return torch.ops.resq.cuda_kernel(device, tokens, n, segments, group_bits, low_bits, weight_group)


@torch.library.register_fake("resq::linear_quantized")
def _linear_quantized_fake(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    wsum: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    segments: Sequence[int],
    group_bits: Sequence[int],
    weight_group: int,
    dtype: torch.dtype,
    raw_run: int = -1,
    kernel: str = "",
    splits: int = 0,
) -> torch.Tensor:
    return codes.new_empty((codes.shape[0], n), dtype=dtype)
