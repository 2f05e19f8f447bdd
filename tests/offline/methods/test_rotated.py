"""QuaRot's and SpinQuant's rotations."""

from __future__ import annotations

import pytest
import torch

from offline.bases.hadamard import normalised_hadamard, random_hadamard
from offline.methods.registry import MethodOptions, methods
from offline.methods.rotated import RotatedPrepared, down_groups, head_mixing
from tests.offline.methods.conftest import MakeLab


@pytest.mark.parametrize("n", [8, 12, 48, 192, 28 * 16])
def test_random_hadamard_has_entries_of_one_size_and_is_orthogonal(n: int) -> None:
    matrix = random_hadamard(n, 0, "x")
    torch.testing.assert_close(matrix.abs(), torch.full((n, n), n**-0.5, dtype=torch.float64))
    torch.testing.assert_close(matrix.T @ matrix, torch.eye(n, dtype=torch.float64), atol=1e-12, rtol=0)
    assert torch.equal(matrix, random_hadamard(n, 0, "x"))
    assert not torch.equal(matrix, random_hadamard(n, 1, "x"))


def test_size_without_a_hadamard_matrix_gets_a_dense_rotation() -> None:
    matrix = random_hadamard(6, 0, "x")
    torch.testing.assert_close(matrix.T @ matrix, torch.eye(6, dtype=torch.float64), atol=1e-12, rtol=0)


def test_heads_are_mixed_by_the_kronecker_product(make_lab: MakeLab) -> None:
    lab = make_lab()
    mix = head_mixing(lab.adapter)
    assert mix is not None
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    matrix = torch.kron(normalised_hadamard(4).float(), torch.eye(16))
    torch.testing.assert_close(mix(x), x @ matrix.T)


def test_full_width_hadamard_before_down_proj(make_lab: MakeLab) -> None:
    assert down_groups(make_lab().adapter) == 1


def test_training_lowers_the_loss_of_the_rounded_model(make_lab: MakeLab) -> None:
    lab = make_lab()
    known = methods(MethodOptions(train_tokens=4096, lr=0.1))
    trained = known["spinquant"].prepare(lab)
    start = known["quarot"].prepare(lab)
    assert isinstance(trained, RotatedPrepared)
    assert isinstance(start, RotatedPrepared)
    residual = trained.rotations.residual
    torch.testing.assert_close(residual.T @ residual, torch.eye(48, dtype=torch.float64), atol=1e-6, rtol=0)
    assert float((residual - start.rotations.residual).abs().max()) > 1e-4
    assert torch.equal(trained.rotations.key, start.rotations.key)
