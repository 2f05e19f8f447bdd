"""Factors in the room of their matrix: more columns than a block, a matrix that has none, and bringing it back."""

from __future__ import annotations

import pytest
import torch

from offline.quantize.triangular import BLOCK, InPlaceCholesky, permute_

COLUMNS = 2 * BLOCK + 37


@pytest.fixture(scope="module")
def matrix() -> torch.Tensor:
    x = torch.randn(2000, COLUMNS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return x.T @ x / 2000


def test_factor_stands_in_the_lower_triangle(matrix: torch.Tensor) -> None:
    work = matrix.clone()
    assert InPlaceCholesky(work, 0.5).complete
    lower = work.tril()
    torch.testing.assert_close(lower @ lower.T, matrix + 0.5 * torch.eye(COLUMNS, dtype=torch.float64))


def test_rows_are_solved(matrix: torch.Tensor) -> None:
    work = matrix.clone()
    rows = torch.randn(5, COLUMNS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = rows @ torch.linalg.inv(matrix + 0.5 * torch.eye(COLUMNS, dtype=torch.float64))
    given = rows.clone()
    assert InPlaceCholesky(work, 0.5).solve_rows_(given) is given
    torch.testing.assert_close(given, expected)


def test_inverse_of_the_factor(matrix: torch.Tensor) -> None:
    work = matrix.clone()
    inverse = InPlaceCholesky(work, 0.1).invert_()
    assert inverse.data_ptr() == work.data_ptr()
    torch.testing.assert_close(inverse, inverse.tril())
    damped = matrix + 0.1 * torch.eye(COLUMNS, dtype=torch.float64)
    torch.testing.assert_close(inverse.T @ inverse, torch.linalg.inv(damped))


def test_matrix_comes_back_bit_for_bit(matrix: torch.Tensor) -> None:
    matrix = ((matrix + matrix.T) / 2).float()
    work = matrix.clone()
    InPlaceCholesky(work, 1.0).restore()
    assert torch.equal(work, matrix)


def test_indefinite_matrix_is_told_and_comes_back(matrix: torch.Tensor) -> None:
    indefinite = (matrix + matrix.T) / 2
    indefinite[-1, -1] = -1
    work = indefinite.clone()
    factor = InPlaceCholesky(work, 0.0)
    assert not factor.complete
    factor.restore()
    assert torch.equal(work, indefinite)


def test_permutation_of_rows_and_columns(matrix: torch.Tensor) -> None:
    order = torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(2))
    work = matrix.clone()
    permute_(work, order)
    assert torch.equal(work, matrix[order][:, order])
