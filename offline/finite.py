"""Whether a tensor holds numbers alone, without a temporary of its size (torch.isfinite makes two)."""

from __future__ import annotations

import torch


def all_finite(tensor: torch.Tensor) -> bool:
    """No NaN and no infinity; the extremes show either."""
    return not tensor.numel() or bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())
