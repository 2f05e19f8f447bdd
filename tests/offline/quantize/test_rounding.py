"""Roundings of activations, K and V against cases worked by hand and the reference."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from offline.quantize.rounding import round_asymmetric, round_columns, round_symmetric
from resq_vllm.formats.plan import LinearPlan, Segment
from resq_vllm.reference import round_activation


def test_symmetric_case_worked_by_hand() -> None:
    # Largest magnitude 7 at 4 bits: scale 1; halves round to even. Clipped to 5/7 of it, 7 lands on code 7 = 5.
    row = torch.tensor([[7.0, -3.4, 2.5, 0.2]])
    assert round_symmetric(row, 4).tolist() == [[7.0, -3.0, 2.0, 0.0]]
    clipped = round_symmetric(row, 4, clip=5 / 7)
    torch.testing.assert_close(clipped[0, 0], torch.tensor(5.0))


def test_asymmetric_case_worked_by_hand() -> None:
    # Range [0, 15] at 4 bits: scale 1, zero point 0. Shrunk to 0.8, 15 saturates at 12.
    row = torch.tensor([[15.0, 3.3, 7.5, 0.0]])
    assert round_asymmetric(row, 4).tolist() == [[15.0, 3.0, 8.0, 0.0]]
    torch.testing.assert_close(round_asymmetric(row, 4, clip=0.8)[0, 0], torch.tensor(12.0))


@given(st.integers(1, 6), st.integers(2, 40), st.sampled_from([2, 3, 4, 8]), st.integers(0, 99))
def test_asymmetric_is_the_reference(tokens: int, columns: int, bits: int, seed: int) -> None:
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))
    plan = LinearPlan((Segment(columns, 0, 0),), (bits,))
    assert torch.equal(round_asymmetric(x, bits), round_activation(x, plan))


def test_zeros_stay_zeros() -> None:
    zeros = torch.zeros(2, 5)
    for rounded in (round_symmetric(zeros, 4), round_asymmetric(zeros, 4)):
        assert torch.equal(rounded, zeros)


def test_columns_are_rounded_by_themselves() -> None:
    x = torch.randn(3, 12, generator=torch.Generator().manual_seed(0))
    chosen = torch.tensor([1, 5, 7])
    rest = torch.tensor([i for i in range(12) if i not in (1, 5, 7)])
    out = round_columns(x, [rest, chosen], [4, 8])
    assert torch.equal(out[:, chosen], round_asymmetric(x[:, chosen], 8))
    assert torch.equal(out[:, rest], round_asymmetric(x[:, rest], 4))
