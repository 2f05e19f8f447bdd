"""Ops that quantize a linear layer's input for the GPU's GEMMs: alone, after RMSNorm, after SiLU·mul and Hadamard.

Each is one kernel launch on CUDA (csrc/cuda) and, on the CPU, the composition that specifies it. All return codes uint8
[M, row_bytes] (formats.activations), scale float32 [M, G] and zero point int32 [M, G]. segments, group_bits,
hadamard_groups, weight_group: of the layer's LinearPlan; nibbles: 4-bit low parts two codes a byte; hadamard_k float32
[k, k] when the Hadamard block order's k > 1. They raise RuntimeError with one sentence on bad arguments.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from resq_vllm import ops
from resq_vllm.formats.activations import ActivationLayout, activation_layout
from resq_vllm.reference import rms_norm, silu_mul

Quantized = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def quantize_pack(
    x: torch.Tensor,
    segments: Sequence[int],
    group_bits: Sequence[int],
    hadamard_groups: int = 0,
    hadamard_k: torch.Tensor | None = None,
    weight_group: int = 0,
    nibbles: bool = False,
) -> Quantized:
    """Online Hadamard (where there is one), per-token quantization and packing of x [M, K]."""
    return torch.ops.resq.quantize_pack(x, segments, group_bits, hadamard_groups, hadamard_k, weight_group, nibbles)


def rms_norm_quantize(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    epsilon: float,
    segments: Sequence[int],
    group_bits: Sequence[int],
    weight_group: int = 0,
    nibbles: bool = False,
) -> Quantized:
    """RMSNorm of x [M, K], or of x + residual, which replaces residual in place, then quantization and packing.

    weight [K]; x, residual and weight have one dtype, to which the sum, the normed row and its product with the weight
    are rounded in turn.
    """
    return torch.ops.resq.rms_norm_quantize(x, residual, weight, epsilon, segments, group_bits, weight_group, nibbles)


def silu_mul_quantize(
    gate_up: torch.Tensor,
    segments: Sequence[int],
    group_bits: Sequence[int],
    hadamard_groups: int = 0,
    hadamard_k: torch.Tensor | None = None,
    weight_group: int = 0,
    nibbles: bool = False,
) -> Quantized:
    """SiLU(gate)·up of gate_up [M, 2K] = [gate | up], each rounded to its dtype, then :func:`quantize_pack`."""
    return torch.ops.resq.silu_mul_quantize(
        gate_up, segments, group_bits, hadamard_groups, hadamard_k, weight_group, nibbles
    )


# --- on the CPU: torch leaves out arguments that have their default ---------------------------------------------------
def _quantize_pack_cpu(
    x: torch.Tensor,
    segments: list[int],
    group_bits: list[int],
    hadamard_groups: int,
    hadamard_k: torch.Tensor | None,
    weight_group: int = 0,
    nibbles: bool = False,
) -> Quantized:
    layout = _layout(segments, group_bits, hadamard_groups, weight_group, nibbles)
    codes, scale, zero = ops.quantize_activation(x, segments, group_bits, hadamard_groups, hadamard_k)
    return layout.pack(codes), scale, zero


def _rms_norm_quantize_cpu(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    epsilon: float,
    segments: list[int],
    group_bits: list[int],
    weight_group: int = 0,
    nibbles: bool = False,
) -> Quantized:
    normed, total = rms_norm(x, residual, weight, epsilon)
    if residual is not None:
        residual.copy_(total)
    return _quantize_pack_cpu(normed, segments, group_bits, 0, None, weight_group, nibbles)


def _silu_mul_quantize_cpu(
    gate_up: torch.Tensor,
    segments: list[int],
    group_bits: list[int],
    hadamard_groups: int,
    hadamard_k: torch.Tensor | None,
    weight_group: int = 0,
    nibbles: bool = False,
) -> Quantized:
    x = silu_mul(gate_up)
    return _quantize_pack_cpu(x, segments, group_bits, hadamard_groups, hadamard_k, weight_group, nibbles)


torch.library.impl("resq::quantize_pack", "CPU", _quantize_pack_cpu)
torch.library.impl("resq::rms_norm_quantize", "CPU", _rms_norm_quantize_cpu)
torch.library.impl("resq::silu_mul_quantize", "CPU", _silu_mul_quantize_cpu)


# --- shapes for torch.compile -----------------------------------------------------------------------------------------
def _empty(x: torch.Tensor, layout: ActivationLayout) -> Quantized:
    groups = (x.shape[0], len(layout.plan.group_bits))
    return (
        x.new_empty((x.shape[0], layout.row_bytes), dtype=torch.uint8),
        x.new_empty(groups, dtype=torch.float32),
        x.new_empty(groups, dtype=torch.int32),
    )


def _layout(
    segments: Sequence[int], group_bits: Sequence[int], hadamard_groups: int, weight_group: int, nibbles: bool
) -> ActivationLayout:
    return activation_layout(tuple(segments), tuple(group_bits), hadamard_groups, weight_group, nibbles)


@torch.library.register_fake("resq::quantize_pack")
@torch.library.register_fake("resq::silu_mul_quantize")
def _quantize_fake(
    x: torch.Tensor,
    segments: Sequence[int],
    group_bits: Sequence[int],
    hadamard_groups: int,
    hadamard_k: torch.Tensor | None,
    weight_group: int = 0,
    nibbles: bool = False,
) -> Quantized:
    return _empty(x, _layout(segments, group_bits, hadamard_groups, weight_group, nibbles))


@torch.library.register_fake("resq::rms_norm_quantize")
def _rms_norm_quantize_fake(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    epsilon: float,
    segments: Sequence[int],
    group_bits: Sequence[int],
    weight_group: int = 0,
    nibbles: bool = False,
) -> Quantized:
    return _empty(x, _layout(segments, group_bits, 0, weight_group, nibbles))
