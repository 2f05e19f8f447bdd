"""Randomised Hadamard matrices, the fixed rotations of QuaRot and the start of SpinQuant's."""

from __future__ import annotations

import torch

from offline.bases.rotation import haar_orthogonal, named_generator
from resq_vllm.errors import ResQError
from resq_vllm.hadamard import hadamard_matrix, hadamard_order, sylvester


def normalised_hadamard(n: int) -> torch.Tensor:
    """H_k ⊗ H_{2^m} / √n with n = k·2^m, float64 [n, n]; raises ResQError where no order is known."""
    k = hadamard_order(n)
    return torch.kron(hadamard_matrix(k).double(), sylvester(n // k).double()) / n**0.5


def random_hadamard(n: int, seed: int, *name: str | int) -> torch.Tensor:
    """diag(±1)·H_n, float64 [n, n], for the same seed and name the same (QuaRot, arXiv 2404.00456, section 3).

    Where no Hadamard matrix of order n is known, a Haar-distributed orthogonal matrix: as random, only denser.
    """
    generator = named_generator(seed, *name)
    try:
        matrix = normalised_hadamard(n)
    except ResQError:
        return haar_orthogonal(n, generator)
    signs = torch.randint(0, 2, (n,), generator=generator).double() * 2 - 1
    return signs[:, None] * matrix
