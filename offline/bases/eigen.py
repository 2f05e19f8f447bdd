"""Eigenvectors of a second moment, ordered so that the last columns hold the most variance."""

from __future__ import annotations

import torch

from resq_vllm.errors import ResQError


def eigenbasis(moment: torch.Tensor, name: str = "second moment") -> tuple[torch.Tensor, torch.Tensor]:
    """(variance [..., d] ascending and >= 0, eigenvectors [..., d, d] in columns) of symmetric [..., d, d]; float64.

    Each eigenvector's largest component is positive, so the result does not depend on the solver's choice of signs.
    Raises ResQError when the matrix is not finite.
    """
    if not bool(torch.isfinite(moment).all()):
        raise ResQError(f"{name}: not finite; the model's activations overflow, calibrate in float32")
    values, vectors = torch.linalg.eigh(moment.double())
    largest = vectors.abs().argmax(dim=-2, keepdim=True)
    signs = torch.sign(vectors.gather(-2, largest))
    # Rounding makes the null space of a singular moment slightly negative.
    return values.clamp_min(0.0), vectors * signs
