"""Eigenbases: orthogonal, ascending, of fixed sign."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offline.bases.eigen import eigenbasis
from resq_vllm.errors import ResQError


def random_moment(d: int, seed: int, batch: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 4 * d, d, generator=generator, dtype=torch.float64) * torch.linspace(0.1, 3, d)
    return x.mT @ x


@settings(deadline=None, max_examples=25)
@given(d=st.integers(1, 24), seed=st.integers(0, 2**31))
def test_orthogonal_ascending_and_diagonalizing(d: int, seed: int) -> None:
    moment = random_moment(d, seed)
    variance, vectors = eigenbasis(moment)
    eye = torch.eye(d, dtype=torch.float64)
    assert (vectors.mT @ vectors - eye).abs().max() < 1e-12
    assert bool((variance.diff(dim=-1) >= 0).all())
    rotated = vectors.mT @ moment @ vectors
    assert (rotated - torch.diag_embed(variance)).abs().max() < 1e-10 * moment.abs().max()


def test_signs_do_not_depend_on_the_solver() -> None:
    variance, vectors = eigenbasis(random_moment(12, 5)[0])
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    assert bool((largest > 0).all())
    flipped = vectors * torch.tensor([1.0, -1.0] * 6)
    again, same = eigenbasis(flipped @ torch.diag(variance) @ flipped.T)
    torch.testing.assert_close(again, variance)
    torch.testing.assert_close(same, vectors)


def test_singular_moment_has_no_negative_variance() -> None:
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    variance, vectors = eigenbasis(x.T @ x)
    assert bool((variance >= 0).all())
    assert float(variance[:6].max()) < 1e-12
    assert (vectors.T @ vectors - torch.eye(8)).abs().max() < 1e-12


def test_moment_that_is_not_finite() -> None:
    with pytest.raises(ResQError, match="of layer 3: not finite"):
        eigenbasis(torch.full((2, 2), float("nan")), "moment of layer 3")
