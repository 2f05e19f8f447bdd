"""Linear layers on the CPU with what a decoder does to their input: RMSNorm and residual sum, or SiLU·mul, in one op.

A layer is its arguments of :func:`resq_vllm.ops.linear_planned` after x: packed, scales, wsum, bias, plan, hadamard_k.
Results are rounded to x's dtype where the separate ops round: the sum, the normed row, its product with the weight,
SiLU and its product (reference.add_rms_norm and silu_mul). The ops raise RuntimeError with one sentence on bad input.
:mod:`resq_vllm.fusion_cpu` puts them into vLLM's graphs.
"""

from __future__ import annotations

import torch

from resq_vllm import ops  # noqa: F401  (loads the library)

Layer = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor | None]


def norm_linear(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, epsilon: float, layer: Layer
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm of x [..., K], or of x + residual, then the layer. Returns y [..., N] and the sum (empty without one)."""
    return torch.ops.resq.norm_linear.default(x, residual, weight, epsilon, *layer)


def silu_linear(x: torch.Tensor, layer: Layer) -> torch.Tensor:
    """The layer on SiLU(gate)·up of x [..., 2K] = [gate | up]."""
    return torch.ops.resq.silu_linear.default(x, *layer)


def decoder_mlp(
    x: torch.Tensor,
    residual: torch.Tensor,
    o: Layer,
    norm_weight: torch.Tensor,
    epsilon: float,
    up: Layer,
    down: Layer,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A decoder layer after its attention: o, :func:`norm_linear` with the residual, :func:`silu_linear`.

    Returns what is to be added to the residual stream, and that stream up to here.
    """
    return torch.ops.resq.decoder_mlp.default(x, residual, *o, norm_weight, epsilon, *up, *down)


def between_attentions(
    x: torch.Tensor,
    residual: torch.Tensor,
    o: Layer,
    norm_weight: torch.Tensor,
    epsilon: float,
    up: Layer,
    down: Layer,
    next_norm_weight: torch.Tensor,
    next_epsilon: float,
    qkv: Layer,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`decoder_mlp`, then :func:`norm_linear` with the next decoder layer's norm and qkv: its results."""
    layers = *o, norm_weight, epsilon, *up, *down, next_norm_weight, next_epsilon, *qkv
    return torch.ops.resq.between_attentions.default(x, residual, *layers)


# --- shapes for torch.compile -----------------------------------------------------------------------------------------
def _out(x: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], scales.shape[1]))


@torch.library.register_fake("resq::norm_linear")
def _norm_linear_fake(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    epsilon: float,
    packed: torch.Tensor,
    scales: torch.Tensor,
    *rest: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _out(x, scales), x.new_empty((0,) if residual is None else x.shape)


@torch.library.register_fake("resq::silu_linear")
def _silu_linear_fake(
    x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, *rest: torch.Tensor | None
) -> torch.Tensor:
    return _out(x, scales)


# The last layer's arguments come last.
@torch.library.register_fake("resq::decoder_mlp")
@torch.library.register_fake("resq::between_attentions")
def decoder_fake(
    x: torch.Tensor, residual: torch.Tensor, *rest: torch.Tensor | float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    scales = rest[-5]
    assert isinstance(scales, torch.Tensor)
    return _out(x, scales), residual.new_empty(residual.shape)
