"""Cholesky factors in the room of their matrix: second moments of wide layers take more memory than anything else.

Everything works on blocks of columns with matrix products, at LAPACK's speed, and needs temporaries of a block of
columns. torch's own routines copy their inputs, up to four matrices at once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.linalg import cholesky_ex, solve_triangular

BLOCK = 512


def blocks(columns: int, size: int = BLOCK) -> Iterator[slice]:
    """0 … ``columns`` in pieces of ``size``."""
    for start in range(0, columns, size):
        yield slice(start, min(start + size, columns))


def permute_(matrix: torch.Tensor, order: torch.Tensor) -> None:
    """matrix[order][:, order] of [K, K] in place; order int64 [K]."""
    for part in blocks(matrix.shape[1]):
        matrix[:, part] = matrix[:, part][order]
    for part in blocks(matrix.shape[0]):
        matrix[part] = matrix[part][:, order]


class InPlaceCholesky:
    """L with A + λI = L·Lᵀ, in the lower triangle of A [K, K] itself.

    The upper triangle keeps A's, from which :meth:`restore` brings A back.

    Attributes:
        complete: False when a pivot was not positive, that is A + λI is not positive definite in A's dtype.

    """

    def __init__(self, matrix: torch.Tensor, ridge: float) -> None:
        """``matrix``: symmetric, float32 or float64; it must not be used until :meth:`restore`."""
        self._matrix = matrix
        self._diagonal = [matrix[part, part].clone() for part in blocks(len(matrix))]
        self.complete = self._factorise(ridge)

    def _factorise(self, ridge: float) -> bool:
        a = self._matrix
        a.diagonal().add_(ridge)
        for part in blocks(len(a)):
            start, stop = part.start, part.stop
            a[start:, part].addmm_(a[start:, :start], a[part, :start].T, alpha=-1)
            lower, failed = cholesky_ex(a[part, part])
            if int(failed):
                return False
            a[part, part] = lower
            if stop < len(a):
                a[stop:, part] = solve_triangular(lower.T, a[stop:, part], upper=True, left=False)
        return True

    def solve_rows_(self, right: torch.Tensor) -> torch.Tensor:
        """B·(A + λI)⁻¹ in the place of B [N, K]."""
        a, parts = self._matrix, list(blocks(len(self._matrix)))
        for part in parts:
            right[:, part].addmm_(right[:, : part.start], a[part, : part.start].T, alpha=-1)
            right[:, part] = solve_triangular(a[part, part].T, right[:, part], upper=True, left=False)
        for part in reversed(parts):
            right[:, part].addmm_(right[:, part.stop :], a[part.stop :, part], alpha=-1)
            right[:, part] = solve_triangular(a[part, part], right[:, part], upper=False, left=False)
        return right

    def invert_(self) -> torch.Tensor:
        """L⁻¹ in the place of L, zeros above it; A cannot be restored afterwards."""
        a, parts = self._matrix, list(blocks(len(self._matrix)))
        for part in parts:
            size = part.stop - part.start
            inverse = solve_triangular(a[part, part], torch.eye(size, dtype=a.dtype, device=a.device), upper=False)
            a[part, part] = inverse
            # From the left, so that a block of L is overwritten when nothing needs it any more.
            for left in (p for p in parts if p.start < part.start):
                between = slice(left.start, part.start)
                a[part, left] = -inverse @ (a[part, between] @ a[between, left])
        return a.tril_()

    def restore(self) -> None:
        """Bring A back, bit for bit."""
        a = self._matrix
        for part, block in zip(blocks(len(a)), self._diagonal, strict=True):
            a[part, part] = block
            a[part.stop :, part] = a[part, part.stop :].T
