"""The online Hadamard: butterflies equal to the reference's bit for bit, dense factors as exact as torch's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resq_vllm import ops, reference
from resq_vllm.hadamard import hadamard_matrix, hadamard_order
from tests.csrc.support import ISAS, assert_no_worse, generator, running


def _dense(n: int) -> torch.Tensor | None:
    k = hadamard_order(n)
    return hadamard_matrix(k).float() if k > 1 else None


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 5),
    groups=st.integers(1, 9),
    k=st.sampled_from([1, 1, 12, 20, 28, 44]),
    power=st.integers(0, 7),
    seed=st.integers(0, 2**31),
)
def test_float32(isa: str, rows: int, groups: int, k: int, power: int, seed: int) -> None:
    n = k << power
    x = torch.randn(rows, groups * n, generator=generator(seed))
    with running(isa):
        y = ops.hadamard(x, groups, _dense(n))
    expected = reference.block_hadamard(x, groups)
    if hadamard_order(n) == 1:
        assert torch.equal(y, expected)
    assert_no_worse(y, expected, reference.block_hadamard(x.double(), groups))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("n", [344 * 4, 924, 148 * 16])
def test_large_dense_orders(isa: str, n: int) -> None:
    x = torch.randn(2, 2 * n, generator=generator(n))
    with running(isa):
        y = ops.hadamard(x, 2, _dense(n))
    assert_no_worse(y, reference.block_hadamard(x, 2), reference.block_hadamard(x.double(), 2))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(isa: str, dtype: torch.dtype) -> None:
    x = torch.randn(3, 5, 256, generator=generator(1)).to(dtype)
    with running(isa):
        y = ops.hadamard(x, 2)
    assert torch.equal(y, reference.block_hadamard(x.float(), 2).to(dtype))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversion_of_every_half_precision_number(isa: str, dtype: torch.dtype) -> None:
    """Blocks of one column are the identity, so this is float -> half after half -> float, 65536 times."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)[None]
    with running(isa):
        y = ops.hadamard(x, x.shape[1])
    number = ~x.isnan()
    assert torch.equal(y[number].view(torch.int16), x[number].view(torch.int16))
    assert y[~number].isnan().all()


def test_no_rows() -> None:
    assert ops.hadamard(torch.empty(0, 64), 2).shape == (0, 64)


def test_wrong_order_is_named() -> None:
    with pytest.raises(RuntimeError, match="a Hadamard block of 24 columns is not hadamard_k's order 1 times a power"):
        ops.hadamard(torch.zeros(1, 48), 2)
    with pytest.raises(RuntimeError, match="hadamard_groups = 5 does not divide 48 columns"):
        ops.hadamard(torch.zeros(1, 48), 5)
