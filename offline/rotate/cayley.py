"""Cayley SGD: gradient descent with momentum over orthogonal matrices.

Source: Li, Fuxin and Todorovic, "Efficient Riemannian Optimization on the Stiefel Manifold via the Cayley Transform"
(arXiv 2002.01113, algorithm 1), for square matrices, where the projection is W = ½(M·Xᵀ − X·Mᵀ).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch.optim import Optimizer

EPSILON = 1e-8


class CayleySGD(Optimizer):
    """One Cayley step a call for parameters [..., n, n], each matrix orthogonal and moved by itself.

    M ← β·M − ∂f/∂X; W = ½(M·Xᵀ − X·Mᵀ) (skew); M ← W·X (projected on the tangent space); then
    X ← (I − α/2·W)⁻¹(I + α/2·W)·X by fixed-point iteration, with α = min(lr, 2q/‖W‖) for each matrix, so that every
    iteration shrinks the error by at least q. Where XᵀX has drifted from I by more than ``drift``, X is
    re-orthonormalised by QR.

    A step keeps the determinant: the optimum is sought in the component of O(n) that the start lies in.
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor],
        lr: float,
        momentum: float = 0.0,
        contraction: float = 0.5,
        iterations: int = 8,
        drift: float = 1e-9,
    ) -> None:
        """Parameters of the algorithm.

        Args:
            params: orthogonal matrices [..., n, n]; float64 if ``drift`` is to mean anything below 1e-6.
            lr: upper bound of the step size α, above 0.
            momentum: β in [0, 1).
            contraction: q in (0, 1); the paper's 0.5.
            iterations: fixed-point iterations a step. The paper takes 2; each adds an order of α‖W‖ to the accuracy.
            drift: largest |XᵀX − I| left standing.

        Raises:
            ValueError: a value out of its range, or a parameter that is not square.

        """
        if not (lr > 0 and 0 <= momentum < 1 and 0 < contraction < 1 and iterations >= 1 and drift >= 0):
            raise ValueError(
                f"lr {lr}, momentum {momentum}, contraction {contraction}, iterations {iterations}, drift {drift}"
            )
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "contraction": contraction,
            "iterations": iterations,
            "drift": drift,
        }
        super().__init__(params, defaults)
        for group in self.param_groups:
            for x in group["params"]:
                if x.ndim < 2 or x.shape[-1] != x.shape[-2]:
                    raise ValueError(f"Cayley SGD moves square matrices, not {list(x.shape)}")

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Move every parameter that has a gradient; ``closure`` recomputes the loss first, as in torch.optim."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for x in group["params"]:
                if x.grad is not None:
                    self._move(x, x.grad, group)
        return loss

    def _move(self, x: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[x]
        momentum = -gradient if "momentum" not in state else group["momentum"] * state["momentum"] - gradient
        w = skew_direction(x, momentum)
        state["momentum"] = w @ x
        alpha = (2 * group["contraction"] / (spectral_bound(w) + EPSILON)).clamp(max=group["lr"])
        moved = cayley_step(x, w, alpha, group["iterations"])
        if float(orthogonality_error(moved)) > group["drift"]:
            moved = nearest_by_qr(moved)
        x.copy_(moved)


def skew_direction(x: torch.Tensor, momentum: torch.Tensor) -> torch.Tensor:
    """W = ½(M·Xᵀ − X·Mᵀ), skew-symmetric [..., n, n]: W·X is M projected on the tangent space at X."""
    product = momentum @ x.mT
    return (product - product.mT) / 2


def spectral_bound(w: torch.Tensor) -> torch.Tensor:
    """An upper bound [...] of the spectral norm of skew W [..., n, n]: the smaller of ‖W‖_F/√2 and ‖W‖₁.

    A skew matrix's singular values come in pairs, hence the √2.
    """
    return torch.minimum(torch.linalg.matrix_norm(w) / 2**0.5, w.abs().sum(-2).amax(-1))


def cayley_step(x: torch.Tensor, w: torch.Tensor, alpha: torch.Tensor, iterations: int) -> torch.Tensor:
    """(I − α/2·W)⁻¹(I + α/2·W)·X by ``iterations`` of Y ← X + α/2·W·(X + Y) from Y = X + α·W·X.

    x, w [..., n, n], alpha [...]. With c = α‖W‖₂/2 < 1 the error is at most 2·c^(iterations+2)/(1−c) in spectral norm:
    the start agrees with the Cayley transform's series to first order, and each iteration adds one.
    """
    half = alpha[..., None, None] / 2 * w
    y = x + 2 * (half @ x)
    for _ in range(iterations):
        y = x + half @ (x + y)
    return y


def orthogonality_error(x: torch.Tensor) -> torch.Tensor:
    """Largest |XᵀX − I| over all matrices of x [..., n, n], a scalar."""
    return (x.mT @ x - torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)).abs().max()


def nearest_by_qr(x: torch.Tensor) -> torch.Tensor:
    """Q of X = Q·R with the diagonal of R positive: of a nearly orthogonal X [..., n, n] one close by."""
    q, r = torch.linalg.qr(x)
    signs = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(x.dtype)
    return q * signs[..., None, :]
