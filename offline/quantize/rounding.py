"""Roundings of activations, K and V that other methods use; ResQ's own are in :mod:`resq_vllm.reference`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from resq_vllm.reference import asymmetric_scale


def round_symmetric(x: torch.Tensor, bits: int, clip: float = 1.0) -> torch.Tensor:
    """Per row of x [..., K]: s = clip·max|x|/(2^(b−1) − 1), codes in [−2^(b−1), 2^(b−1) − 1]; float32 [..., K]."""
    x = x.float()
    largest = 2 ** (bits - 1) - 1
    scale = x.abs().amax(-1, keepdim=True) * (clip / largest)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return torch.round(x / scale).clamp_(-largest - 1, largest) * scale


def round_asymmetric(x: torch.Tensor, bits: int, clip: float = 1.0) -> torch.Tensor:
    """Per row of x [..., K]: the range [min, max], widened to include 0 and shrunk to ``clip`` of it; float32."""
    x = x.float()
    scale, zero = asymmetric_scale(x, bits)
    if clip != 1.0:
        scale, zero = asymmetric_scale(torch.stack((x.amin(-1), x.amax(-1)), -1) * clip, bits)
    return ((torch.round(x / scale) + zero).clamp_(0, 2**bits - 1) - zero) * scale


def round_columns(x: torch.Tensor, columns: Sequence[torch.Tensor | slice], bits: Sequence[int]) -> torch.Tensor:
    """Asymmetric per row and set of columns, each with its bits: K or V in any number of parts; float32 [..., K]."""
    out = torch.empty(x.shape, device=x.device)
    for index, width in zip(columns, bits, strict=True):
        out[..., index] = round_asymmetric(x[..., index], width)
    return out
