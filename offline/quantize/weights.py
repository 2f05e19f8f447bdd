"""The symmetric weight quantizer: one scale per output channel, optionally clipped.

Source: method of arXiv 2412.14363 section 4 (weights symmetric per output channel, clip search as in QuaRot, arXiv
2404.00456): scale = p·absmax/(2^(b-1) − 1), codes in [−2^(b-1), 2^(b-1) − 1], p minimising Σ|Ŵ − W|^2.4 per row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

CLIP_STEPS = 80
CLIP_GRID = 100
CLIP_NORM = 2.4
_CHUNK_ELEMENTS = 1 << 20


def code_range(bits: int) -> tuple[int, int]:
    """Smallest and largest code of a signed ``bits``-bit integer: (−8, 7) at 4 bits."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def clip_ratios() -> list[float]:
    """The candidates of the clip search, p = 1, 0.99, …, 0.21."""
    return [1 - step / CLIP_GRID for step in range(CLIP_STEPS)]


def symmetric_scale(weight: torch.Tensor, bits: int, clip: bool = True) -> torch.Tensor:
    """Scale of each output channel.

    Args:
        weight: float32 [N, K].
        bits: 4 or 8.
        clip: search the clip ratio; otherwise p = 1.

    Returns:
        float32 [N], positive; 1 for a row of zeros (or of no columns), whose codes are 0 at any scale.

    """
    largest = code_range(bits)[1]
    if weight.shape[1] == 0:
        return torch.ones(weight.shape[0], dtype=torch.float32, device=weight.device)
    scale = weight.abs().amax(dim=1) / largest
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    if not clip:
        return scale
    # Row chunks keep the candidates' temporaries in the processor's cache, and memory independent of N.
    rows = max(1, _CHUNK_ELEMENTS // weight.shape[1])
    return torch.cat(
        [_clipped_scale(weight[i : i + rows], scale[i : i + rows], bits) for i in range(0, len(scale), rows)]
    )


def _clipped_scale(weight: torch.Tensor, full: torch.Tensor, bits: int) -> torch.Tensor:
    best_scale, best_error = full, torch.full_like(full, torch.inf)
    for ratio in clip_ratios():
        scale = full * ratio
        codes = _rounded(weight, scale, bits)
        error = codes.mul_(scale[:, None]).sub_(weight).abs_().pow_(CLIP_NORM).sum(dim=1)
        better = error < best_error
        best_scale = torch.where(better, scale, best_scale)
        best_error = torch.where(better, error, best_error)
    return best_scale


def _rounded(weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    smallest, largest = code_range(bits)
    return (weight / scale[:, None]).round_().clamp_(smallest, largest)


def symmetric_codes(weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Round ``weight`` float32 [N, K] half to even on the grid of ``scale`` float32 [N]: int8 [N, K]."""
    return _rounded(weight, scale, bits).to(torch.int8)


@dataclass(frozen=True)
class WeightGrid:
    """What a weight [N, K] may be rounded to: s·q with a scale and bits for every (output channel, column).

    Attributes:
        scale: float32 [S, N], one row for each set of columns that share scales.
        row: int64 [K], the row of every column.
        bits: of each row's codes.

    """

    scale: torch.Tensor
    row: torch.Tensor
    bits: tuple[int, ...]

    @classmethod
    def of_parts(
        cls, weight: torch.Tensor, widths: Sequence[int], bits: Sequence[int], clip: bool = True
    ) -> WeightGrid:
        """One scale per output channel and part of ``weight`` float32 [N, K], whose parts stand side by side."""
        parts = weight.split(list(widths), dim=1)
        scale = torch.stack([symmetric_scale(part, b, clip) for part, b in zip(parts, bits, strict=True)])
        return cls(scale, torch.repeat_interleave(torch.arange(len(bits)), torch.tensor(widths)), tuple(bits))

    def round(self, weight: torch.Tensor) -> torch.Tensor:
        """Nearest codes int8 [N, K], half to even."""
        codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        for row, bits in enumerate(self.bits):
            columns = self.row == row
            codes[:, columns] = symmetric_codes(weight[:, columns], self.scale[row], bits)
        return codes

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """s·q, float32 [N, K]."""
        return codes * self.scale[self.row.to(self.scale.device)].T
