"""MXINT against a case worked by hand and a slow formula in exact arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offline.quantize.mxint import mxint, mxint_bits


def slow(values: list[float], bits: int, block: int) -> list[float]:
    """Element by element with exact fractions: the exponent is found by counting, not by a logarithm."""
    out: list[float] = []
    largest = 2 ** (bits - 1) - 1
    for start in range(0, len(values), block):
        part = [Fraction(v) for v in values[start : start + block]]
        peak = max(abs(v) for v in part)
        if not peak:
            out += [0.0] * len(part)
            continue
        exponent = 0
        while Fraction(2) ** (exponent + 1) <= peak:
            exponent += 1
        while Fraction(2) ** exponent > peak:
            exponent -= 1
        step = Fraction(2) ** (exponent - bits + 2)
        # round() of a Fraction rounds half to even.
        out += [float(max(-largest, min(largest, round(v / step))) * step) for v in part]
    return out


def test_worked_by_hand() -> None:
    # max 5.0: e = 2, step 2^(2−2) = 1 at 4 bits, codes within ±7; second block: max 0.3, e = −2, step 2^−4.
    x = torch.tensor([5.0, -1.5, 0.5, 2.5, 0.3, -0.28, 0.03, 0.1])
    assert mxint(x, 4, 4).tolist() == [5.0, -2.0, 0.0, 2.0, 0.3125, -0.25, 0.0, 0.125]


def test_elements_above_the_largest_code_are_clamped() -> None:
    # max 7.9: e = 2, step 1, round(7.9) = 8 does not fit 4 bits.
    assert mxint(torch.tensor([7.9, -7.9, 1.0]), 4, 3).tolist() == [7.0, -7.0, 1.0]


@given(
    values=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40),
    bits=st.sampled_from([2, 3, 4, 8]),
    block=st.sampled_from([1, 3, 16]),
)
def test_equals_slow_formula(values: list[float], bits: int, block: int) -> None:
    values = [v if v == 0 or abs(v) > 1e-30 else 0.0 for v in values]
    assert mxint(torch.tensor(values), bits, block).tolist() == slow(values, bits, block)


@given(shape=st.sampled_from([(5,), (3, 16), (2, 3, 33)]), seed=st.integers(0, 2**31))
def test_rows_are_apart_and_error_is_half_a_step(shape: tuple[int, ...], seed: int) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    y = mxint(x, 8)
    assert (y.shape, y.dtype) == (x.shape, torch.float32)
    assert torch.equal(y.reshape(-1, shape[-1])[0], mxint(x.reshape(-1, shape[-1])[0], 8))
    # Half a step of 2^(e−6), or a whole one where 127.5 of them and more clamp to 127.
    assert float((x - y).abs().max()) <= float(x.abs().max()) / 64


def test_is_idempotent_and_scales_by_powers_of_two() -> None:
    x = torch.randn(4, 48, generator=torch.Generator().manual_seed(1))
    assert torch.equal(mxint(mxint(x)), mxint(x))
    assert torch.equal(mxint(x * 2**-9), mxint(x) * 2**-9)


@pytest.mark.parametrize("value", [0.0, 1.0, -4.0, 3.0e38, 1.5e-38])
def test_constant_rows_of_any_magnitude(value: float) -> None:
    expected = slow([value], 4, 16)[0]
    assert mxint(torch.full((20,), value)).tolist() == pytest.approx([expected] * 20)


def test_half_precision_inputs() -> None:
    x = torch.randn(32, generator=torch.Generator().manual_seed(2)).bfloat16()
    assert torch.equal(mxint(x), mxint(x.float()))


def test_bits_count_the_exponent() -> None:
    assert mxint_bits(4) == 4.5
    assert math.isclose(mxint_bits(8, 32), 8.25)
