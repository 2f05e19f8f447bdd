"""Rotations with a trainable part: U = U_initial · blkdiag(R_1, …, R_m), R_i orthogonal, the identity at first.

Columns of different blocks never mix, so what a basis assigns to each precision stays assigned to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from offline.bases.bases import Rotations
from resq_vllm.errors import ResQError


@dataclass(frozen=True)
class RotationBlocks:
    """Widths of the blocks inside which rotations may turn, in column order (low first); zeros are passed over.

    Attributes:
        residual: of U_A, summing to d.
        value: of U_B, summing to hd.
        share_value_heads: one R a layer for all of its kv heads (SpinQuant's R2) instead of one R a head.

    """

    residual: tuple[int, ...]
    value: tuple[int, ...]
    share_value_heads: bool = False


class TrainableRotations(nn.Module):
    """Parameters R_i (float64): for U_A [n, n] a block, for U_B [L, kv or 1, n, n] a block. U_C stays as given."""

    def __init__(self, initial: Rotations, blocks: RotationBlocks) -> None:
        """Raises ResQError when the blocks do not add up to the sizes of ``initial``."""
        super().__init__()
        self._initial = initial
        layers, kv, hd, _ = initial.value.shape
        for name, widths, dim in (
            ("residual", blocks.residual, initial.residual.shape[-1]),
            ("value", blocks.value, hd),
        ):
            if sum(widths) != dim or any(n < 0 for n in widths):
                raise ResQError(
                    f"rotation blocks of widths {list(widths)} do not fill the {dim} columns of the {name} rotation; "
                    "give widths that sum to it"
                )
        self._residual_widths = [n for n in blocks.residual if n]
        self._value_widths = [n for n in blocks.value if n]
        device = initial.residual.device
        heads = 1 if blocks.share_value_heads else kv
        self.residual = nn.ParameterList(_identities((), self._residual_widths, device))
        self.value = nn.ParameterList(_identities((layers, heads), self._value_widths, device))

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """U_A [d, d] and U_B [L, kv, hd, hd], float64, differentiable in the parameters."""
        return (
            _turn(self._initial.residual, self._residual_widths, list(self.residual)),
            _turn(self._initial.value, self._value_widths, list(self.value)),
        )

    @torch.no_grad()
    def rotations(self) -> Rotations:
        """The rotations as they stand, detached."""
        residual, value = self()
        return replace(self._initial, residual=residual, value=value)


def _identities(batch: tuple[int, ...], widths: Sequence[int], device: torch.device) -> Iterator[nn.Parameter]:
    for n in widths:
        yield nn.Parameter(torch.eye(n, dtype=torch.float64, device=device).repeat(*batch, 1, 1))


def _turn(initial: torch.Tensor, widths: list[int], factors: list[torch.Tensor]) -> torch.Tensor:
    columns = initial.split(widths, dim=-1)
    return torch.cat([part @ r for part, r in zip(columns, factors, strict=True)], dim=-1)
