"""Hadamard orders, blocks and the fast transform against the dense definition."""

from __future__ import annotations

import pytest
import torch

from resq_vllm.errors import ResQError
from resq_vllm.hadamard import block_matrix, hadamard_matrix, hadamard_order
from resq_vllm.reference import block_hadamard

# FFN widths of current models and the order that carries their odd factor (method: 14336 = 28·512, …).
FFN_ORDERS = {14336: 28, 28672: 28, 11008: 344, 13824: 108, 27648: 108, 8960: 140, 5632: 44, 18944: 148, 4864: 76}
FFN_ORDERS |= {9728: 76, 29568: 924, 17408: 68, 25600: 100, 768: 12, 8192: 1}


@pytest.mark.parametrize("k", [1, 2, 4, 12, 20, 28, 36, 44, 52, 60, 68, 76, 100, 108, 140, 148, 344, 924])
def test_matrix_is_hadamard(k: int) -> None:
    h = hadamard_matrix(k).long()
    assert h.abs().eq(1).all()
    assert torch.equal(h @ h.T, k * torch.eye(k, dtype=torch.long))


@pytest.mark.parametrize(("width", "order"), FFN_ORDERS.items())
def test_ffn_width_and_its_eight_blocks_have_an_order(width: int, order: int) -> None:
    assert hadamard_order(width) == order
    assert hadamard_order(width // 8) == order


@pytest.mark.parametrize("n", [3, 6, 14, 92])
def test_order_without_construction_is_refused(n: int) -> None:
    with pytest.raises(ResQError, match="Hadamard"):
        hadamard_order(n)


@pytest.mark.parametrize(("groups", "n"), [(1, 64), (8, 96), (2, 28), (3, 1), (4, 2)])
def test_fast_transform_equals_dense_blocks(groups: int, n: int) -> None:
    x = torch.randn(5, groups * n, dtype=torch.float64)
    dense = torch.block_diag(*[block_matrix(n)] * groups)
    torch.testing.assert_close(block_hadamard(x, groups), x @ dense.T, rtol=0, atol=1e-12)


def test_transform_keeps_norms() -> None:
    x = torch.randn(3, 768, dtype=torch.float64)
    torch.testing.assert_close(block_hadamard(x, 8).norm(dim=-1), x.norm(dim=-1))
