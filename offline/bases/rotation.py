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


def subspace_rotation(n: int, high: int, seed: int, *name: str | int) -> torch.Tensor:
    """blkdiag(R_low [n−high], R_high [high]), float64 [n, n]; ``high`` = 0 or n leaves one block."""
    result = torch.zeros(n, n, dtype=torch.float64)
    low = n - high
    result[:low, :low] = haar_orthogonal(low, named_generator(seed, *name, "low"))
    result[low:, low:] = haar_orthogonal(high, named_generator(seed, *name, "high"))
    return result
