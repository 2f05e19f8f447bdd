"""Cayley SGD against the closed form of its step, and against problems whose optimum is known."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offline.bases.rotation import haar_orthogonal, named_generator
from offline.rotate.cayley import (
    CayleySGD,
    cayley_step,
    nearest_by_qr,
    orthogonality_error,
    skew_direction,
    spectral_bound,
)


def haar(*shape: int, seed: int = 0) -> torch.Tensor:
    """Orthogonal [..., n, n] for a shape [..., n]."""
    *batch, n = shape
    count = int(torch.tensor(batch).prod()) if batch else 1
    matrices = [haar_orthogonal(n, named_generator(seed, "matrix", i)) for i in range(count)]
    return torch.stack(matrices).reshape(*batch, n, n)


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def closed_form(x: torch.Tensor, w: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """(I + α/2·Y)⁻¹(I − α/2·Y)·X with Y = −W, by a linear solve."""
    half = -alpha[..., None, None] / 2 * w
    eye = torch.eye(x.shape[-1], dtype=x.dtype)
    return torch.linalg.solve(eye + half, (eye - half) @ x)


def procrustes(a: torch.Tensor, b: torch.Tensor, determinant: float) -> torch.Tensor:
    """argmin ‖A − B·X‖_F over orthogonal X of that determinant (Schönemann; Kabsch's sign on the least direction)."""
    u, _, vh = torch.linalg.svd(b.mT @ a)
    signs = torch.ones(len(u), dtype=u.dtype)
    signs[-1] = determinant * torch.linalg.det(u @ vh).sign()
    return u @ torch.diag(signs) @ vh


@pytest.mark.parametrize("shape", [(7,), (1,), (2,), (3, 2, 5)])
def test_one_step_is_the_closed_form(shape: tuple[int, ...]) -> None:
    start, gradient = haar(*shape), gaussian(*shape, shape[-1])
    x = start.clone().requires_grad_(True)
    x.grad = gradient.clone()
    CayleySGD([x], lr=0.01, iterations=12).step()
    # The paper's Ŵ = M·Xᵀ − ½·X·(Xᵀ·M·Xᵀ) with M = −gradient, W = Ŵ − Ŵᵀ.
    product = -gradient @ start.mT
    auxiliary = product - start @ (start.mT @ product) / 2
    w = auxiliary - auxiliary.mT
    expected = closed_form(start, w, torch.full(start.shape[:-2], 0.01, dtype=torch.float64))
    torch.testing.assert_close(x.detach(), expected, rtol=0, atol=1e-12)
    assert shape == (1,) or float((x.detach() - start).abs().max()) > 1e-3


def test_second_step_carries_the_projected_momentum() -> None:
    start, first, second = haar(5), gaussian(5, 5, seed=1), gaussian(5, 5, seed=2)
    x = start.clone().requires_grad_(True)
    optimizer = CayleySGD([x], lr=0.01, momentum=0.8, iterations=12)
    alpha = torch.tensor(0.01, dtype=torch.float64)
    x.grad = first.clone()
    optimizer.step()
    w = skew_direction(start, -first)
    middle = closed_form(start, w, alpha)
    x.grad = second.clone()
    optimizer.step()
    w = skew_direction(middle, 0.8 * (w @ start) - second)
    torch.testing.assert_close(x.detach(), closed_form(middle, w, alpha), rtol=0, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 9),
    batch=st.integers(1, 3),
    seed=st.integers(0, 2**31),
    size=st.floats(1e-6, 1e6),
    iterations=st.integers(1, 10),
)
def test_contraction_bounds_the_error_whatever_the_gradient(
    n: int, batch: int, seed: int, size: float, iterations: int
) -> None:
    x = haar(batch, n, seed=seed)
    w = skew_direction(x, gaussian(batch, n, n, seed=seed) * size)
    bound = spectral_bound(w)
    spectral = torch.linalg.matrix_norm(w, 2)
    assert bool((bound >= spectral * (1 - 1e-12)).all())
    alpha = 1.0 / (bound + 1e-8)  # 2q/‖W‖ with q = 0.5
    c = alpha * spectral / 2
    error = torch.linalg.matrix_norm(cayley_step(x, w, alpha, iterations) - closed_form(x, w, alpha), 2)
    assert bool((error <= 2 * c ** (iterations + 2) / (1 - c) + 1e-12).all())


def test_long_step_is_cut_to_the_contraction() -> None:
    x = haar(6).requires_grad_(True)
    start = x.detach().clone()
    x.grad = 1e4 * gaussian(6, 6)
    CayleySGD([x], lr=10.0, iterations=30).step()
    w = skew_direction(start, -1e4 * gaussian(6, 6))
    torch.testing.assert_close(x.detach(), closed_form(start, w, 1.0 / spectral_bound(w)), rtol=0, atol=1e-9)


def test_every_matrix_of_a_batch_has_its_own_step_size() -> None:
    together = haar(2, 6).requires_grad_(True)
    gradient = gaussian(2, 6, 6) * torch.tensor([1e-2, 1e3], dtype=torch.float64)[:, None, None]
    alone = [together.detach()[i].clone().requires_grad_(True) for i in range(2)]
    together.grad = gradient
    for i, x in enumerate(alone):
        x.grad = gradient[i].clone()
    CayleySGD([together], lr=1.0).step()
    CayleySGD(alone, lr=1.0).step()
    torch.testing.assert_close(together.detach(), torch.stack([x.detach() for x in alone]))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_orthogonal_after_many_violent_steps(dtype: torch.dtype, tolerance: float) -> None:
    x = haar(3, 8).to(dtype).requires_grad_(True)
    optimizer = CayleySGD([x], lr=5.0, momentum=0.9, iterations=2, drift=tolerance)
    for step in range(400):
        x.grad = gaussian(3, 8, 8, seed=step).to(dtype)
        optimizer.step()
    assert float(orthogonality_error(x.detach())) <= max(tolerance, 1e-6 if dtype == torch.float64 else 2e-5)


def test_drift_is_removed_only_beyond_its_tolerance() -> None:
    errors = []
    for drift in (1e-9, 1e9):
        x = haar(8).requires_grad_(True)
        optimizer = CayleySGD([x], lr=5.0, iterations=1, drift=drift)
        for step in range(20):
            x.grad = gaussian(8, 8, seed=step)
            optimizer.step()
        errors.append(float(orthogonality_error(x.detach())))
    assert errors[0] < 1e-9 < 1e-3 < errors[1]


def test_qr_leaves_an_orthogonal_matrix_and_mends_a_drifted_one() -> None:
    x = haar(4, 6)
    torch.testing.assert_close(nearest_by_qr(x), x)
    drifted = x + 1e-4 * gaussian(4, 6, 6)
    mended = nearest_by_qr(drifted)
    assert float(orthogonality_error(mended)) < 1e-12
    assert float((mended - x).abs().max()) < 1e-2


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("determinant", [1.0, -1.0])
def test_procrustes_reaches_the_svd_solution_of_its_component(determinant: float, momentum: float) -> None:
    n, target = 8, haar(8, seed=3)
    target[:, 0] *= determinant * torch.linalg.det(target).sign()
    b = gaussian(20, n, seed=4)
    a = b @ target + 0.3 * gaussian(20, n, seed=5)
    x = torch.eye(n, dtype=torch.float64)
    x[0, 0] = determinant
    x.requires_grad_(True)
    optimizer = CayleySGD([x], lr=0.02 * (1 - momentum), momentum=momentum)
    for _ in range(1500):
        optimizer.zero_grad()
        torch.autograd.backward(((a - b @ x) ** 2).sum())
        optimizer.step()
    assert float(torch.linalg.det(x.detach())) == pytest.approx(determinant)
    torch.testing.assert_close(x.detach(), procrustes(a, b, determinant), rtol=0, atol=1e-6)


def test_closure_gives_the_loss_and_parameters_without_gradient_stay() -> None:
    x, still = haar(4).requires_grad_(True), haar(4, seed=1).requires_grad_(True)
    before = still.detach().clone()
    target = haar(4, seed=2)
    optimizer = CayleySGD([x, still], lr=0.1)

    def closure() -> float:
        optimizer.zero_grad()
        loss = ((x - target) ** 2).sum()
        torch.autograd.backward(loss)
        return loss.item()

    losses = [optimizer.step(closure) for _ in range(5)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]
    assert torch.equal(still.detach(), before)


@pytest.mark.parametrize(
    "bad",
    [{"lr": 0.0}, {"momentum": 1.0}, {"contraction": 1.0}, {"iterations": 0}, {"drift": -1.0}, {"lr": float("nan")}],
)
def test_values_out_of_range(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="contraction"):
        CayleySGD([haar(4).requires_grad_(True)], **({"lr": 0.1} | bad))  # type: ignore[arg-type]


def test_not_square() -> None:
    with pytest.raises(ValueError, match="square matrices"):
        CayleySGD([torch.zeros(3, 4, requires_grad=True)], lr=0.1)
