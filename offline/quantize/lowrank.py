"""LQER and L²QER: a low-rank correction of a linear layer's quantization error (arXiv 2402.02446).

With E = (W − Ŵ)ᵀ [K, N] and the truncated singular value decomposition diag(s)·E ≈ U_k·Σ_k·V_kᵀ, the correction
A·B = diag(s)⁻¹·U_k · Σ_k·V_kᵀ is the best one of rank k in the norm ‖diag(s)·(E − A·B)‖. LQER has s = 1; L²QER weights
input channel j by how large its activations are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from resq_vllm.errors import ResQError

SMALLEST_MAGNITUDE = 1e-4


def activation_scale(magnitude: torch.Tensor) -> torch.Tensor:
    """s [K] of L²QER from the channels' mean magnitudes [K]: clamped from below, divided by sqrt(min·max).

    The magnitude is the maximum over calibration batches of mean |x_j| (offline.calibrate.channels).
    """
    s = magnitude.float().clamp(min=SMALLEST_MAGNITUDE)
    return s / (s.min() * s.max()).sqrt()


@dataclass(frozen=True)
class LowRank:
    """y += (x·A)·B.

    Attributes:
        a: [K, k], float32 unless it was cast.
        b: [k, N].

    """

    a: torch.Tensor
    b: torch.Tensor

    @property
    def rank(self) -> int:
        """k."""
        return self.a.shape[1]

    def weight(self) -> torch.Tensor:
        """(A·B)ᵀ [N, K]: what the correction adds to the weight."""
        return (self.a @ self.b).T

    def to(self, dtype: torch.dtype) -> LowRank:
        """Both factors cast."""
        return LowRank(self.a.to(dtype), self.b.to(dtype))


def low_rank(
    weight: torch.Tensor,
    quantized: torch.Tensor,
    rank: int,
    scale: torch.Tensor | None = None,
    name: str = "layer",
) -> LowRank:
    """The correction of ``quantized`` towards ``weight``, both [N, K].

    Args:
        weight: W of any float type.
        quantized: Ŵ.
        rank: k, at most min(K, N): a larger one is no error but adds zero columns, so that all layers have one k.
        scale: s [K], positive (:func:`activation_scale`), or None for LQER.
        name: the layer, for messages.

    Raises ResQError naming the layer when the weight or the scale is not finite.

    """
    error = (weight.float() - quantized.float()).T
    scaled = error if scale is None else scale.float()[:, None] * error
    if not bool(torch.isfinite(scaled).all()):
        raise ResQError(f"{name}: the weight or its calibration magnitudes are not finite; check the model's files")
    a, b = _truncated(scaled.double(), rank)
    if scale is not None:
        a = a / scale.double()[:, None]
    return LowRank(a.float().contiguous(), b.float().contiguous())


def _truncated(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """U_k [K, k] and Σ_k·V_kᵀ [k, N] of ``matrix`` float64 [K, N], padded with zeros beyond its rank.

    From the eigenvectors of the smaller Gram matrix, which is several times faster than a decomposition of the whole;
    projecting the matrix on them loses nothing to the squared condition number.
    """
    rows, columns = matrix.shape
    kept = min(rank, rows, columns)
    wide = rows <= columns
    gram = matrix @ matrix.T if wide else matrix.T @ matrix
    vectors = torch.linalg.eigh(gram)[1].flip(1)[:, :kept]
    if wide:
        a, b = vectors, vectors.T @ matrix
    else:
        projected = matrix @ vectors
        sigma = projected.norm(dim=0)
        a = projected / torch.where(sigma > 0, sigma, torch.ones_like(sigma))
        b = sigma[:, None] * vectors.T
    missing = rank - kept
    return torch.nn.functional.pad(a, (0, missing)), torch.nn.functional.pad(b, (0, 0, 0, missing))
