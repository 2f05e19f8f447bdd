"""Round to nearest: the fast option, which needs no calibration activations."""

from __future__ import annotations

import torch

from offline.quantize.weights import symmetric_codes, symmetric_scale


def rtn(weight: torch.Tensor, bits: int, clip: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize ``weight`` float32 [N, K] to the nearest code: (codes int8 [N, K], scale float32 [N])."""
    scale = symmetric_scale(weight, bits, clip)
    return symmetric_codes(weight, scale, bits), scale
