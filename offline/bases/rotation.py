"""Random rotations: Haar-distributed orthogonal matrices, the same for the same seed and name."""

from __future__ import annotations

import hashlib

import torch


def named_generator(seed: int, *name: str | int) -> torch.Generator:
    """A generator of its own for each (seed, name): the order in which matrices are drawn does not matter."""
    text = "/".join(str(part) for part in (seed, *name))
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big"))


def haar_orthogonal(n: int, generator: torch.Generator) -> torch.Tensor:
    """Orthogonal [n, n], float64, uniform over O(n): QR of a Gaussian with the diagonal of R made positive."""
    q, r = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    signs = torch.where(r.diagonal() < 0, -1.0, 1.0).to(torch.float64)
    return q * signs


def subspace_rotation(n: int, high: int, seed: int, *name: str | int, lowest: int = 0) -> torch.Tensor:
    """blkdiag(R_lowest [lowest], R_low [n−high−lowest], R_high [high]), float64 [n, n]; a block may be empty."""
    blocks = {"lowest": lowest, "low": n - high - lowest, "high": high}
    matrices = [haar_orthogonal(width, named_generator(seed, *name, block)) for block, width in blocks.items()]
    return torch.block_diag(*(matrix for matrix in matrices if len(matrix)))
