"""Random rotations: orthogonal, reproducible, uniform, and confined to their blocks."""

from __future__ import annotations

import pytest
import torch

from offline.bases.rotation import haar_orthogonal, named_generator, subspace_rotation


@pytest.mark.parametrize("n", [0, 1, 2, 33])
def test_orthogonal(n: int) -> None:
    q = haar_orthogonal(n, named_generator(0, "x"))
    assert q.shape == (n, n)
    assert q.dtype == torch.float64
    torch.testing.assert_close(q.T @ q, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)


def test_same_seed_and_name_same_matrix() -> None:
    assert torch.equal(haar_orthogonal(8, named_generator(3, "v", 1)), haar_orthogonal(8, named_generator(3, "v", 1)))
    for other in (named_generator(4, "v", 1), named_generator(3, "v", 2), named_generator(3, "k", 1)):
        assert not torch.allclose(haar_orthogonal(8, named_generator(3, "v", 1)), haar_orthogonal(8, other))


def test_first_entry_is_distributed_as_under_haar_measure() -> None:
    """In O(2), q00 is the cosine of a uniform angle: P(|q00| < 1/√2) = 1/2 and mean 0 (not so without the sign fix)."""
    entries = torch.stack([haar_orthogonal(2, named_generator(seed))[0, 0] for seed in range(2000)])
    assert abs(float(entries.mean())) < 0.06
    assert abs(float((entries.abs() < 0.5**0.5).double().mean()) - 0.5) < 0.05


@pytest.mark.parametrize("high", [0, 1, 4, 16])
def test_subspaces_do_not_mix(high: int) -> None:
    r = subspace_rotation(16, high, 0, "residual")
    low = 16 - high
    assert not bool(r[:low, low:].any())
    assert not bool(r[low:, :low].any())
    torch.testing.assert_close(r.T @ r, torch.eye(16, dtype=torch.float64), rtol=0, atol=1e-12)
    if high in (0, 16):
        assert int((r != 0).sum()) == 256
