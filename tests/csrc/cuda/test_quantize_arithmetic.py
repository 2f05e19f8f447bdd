"""Arithmetic of the kernel of contiguous rows, on the host: quotients of 16-bit floats, and two of these in a word."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch

from tests.csrc.cuda.quantize_support import emulation

DTYPES = [torch.float16, torch.bfloat16]


def _doubtful(bits: int) -> list[tuple[int, int, int]]:
    """All (n, d, x), d of 24 bits and x of ``bits``, for which quotient_of_half may be rounded unlike x/d (scalar.h).

    These x/d lie within 3/2^24 of a unit in the last place of a midpoint m, which is n + 1/2 and half a unit above or
    below it. As integers, b for m and x scaled by 2^s, that is b·d - x = c with 0 < |c| <= 6: as x ends in zeros, d is
    determined by b and c modulo more than 2^24. (c = 0 would need an x of more than 24 bits: b is odd.)
    """
    found = []
    for n in range(256):
        k = (2 * n + 1).bit_length() - 2  # n + 1/2 lies in [2^k, 2^(k+1))
        base = (2 * n + 1) << (23 - k)
        below = 2 * base - 1 if n == 0 else base - 1  # below 1/2 units are half as large
        for b in (base + 1, below):
            modulus = 1 << (b.bit_length() + 22 - bits)
            inverse = pow(b, -1, modulus)
            for c in (c for c in range(-12, 13) if c):
                d = c * inverse % modulus
                x = b * d - c
                if 2**23 <= d < 2**24 and (x // (x & -x)).bit_length() <= bits:
                    found.append((n, d, x))
    return found


@pytest.mark.parametrize("bits", [8, 11])
def test_doubtful_quotients_of_halves_are_rounded_as_the_division(bits: int) -> None:
    doubtful = _doubtful(bits)
    assert len(doubtful) == 1
    for n, d, x in doubtful:
        # x to its size: about n + 1/2 times d.
        size = Fraction(x)
        while size > (n + 1) * d:
            size /= 2
        exact = torch.tensor(float(size)) / torch.tensor(float(d))
        ours = emulation().resq_quotient_of_half(ctypes.c_float(float(size)), ctypes.c_float(float(d)))
        assert ours == exact.item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("magnitude", [-90, -24, -3, 0, 5, 13, 90, 96])
def test_quotients_of_halves(magnitude: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(magnitude + 200)
    n = 300_000
    if dtype == torch.float16:
        magnitude = max(-20, min(magnitude, 13))
    x = (torch.randn(n, generator=g) * 2.0**magnitude).to(dtype).float()
    # Half of the divisors are those of a boundary, correctly rounded, and their neighbours.
    d = x.abs() / (torch.randint(0, 256, (n,), generator=g) + 0.5)
    d = torch.cat((d[: n // 3], torch.nextafter(d[n // 3 : n // 2], torch.zeros(())), d[n // 2 :]))
    d[n // 2 :] = x[n // 2 :].abs() / (torch.rand(n - n // 2, generator=g) * 255 + 0.01)
    fits = (d >= 2.0**-96) & (d <= 2.0**96)
    x, d = x[fits].contiguous(), d[fits].contiguous()
    assert len(x) > 1000
    pointers = (ctypes.c_void_p(t.data_ptr()) for t in (x, d))
    assert emulation().resq_wrong_half_quotients(*pointers, ctypes.c_int64(len(x))) == 0


def _word(pair: torch.Tensor) -> int:
    first, second = (v & 0xFFFF for v in pair.view(torch.int16).tolist())
    return first | second << 16


def _minimum(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.where(x.isnan(), y, torch.where(y.isnan(), x, torch.minimum(x, y)))


PAIRS: list[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = [
    _minimum,
    torch.maximum,
    lambda x, y: (x.float() + y.float()).to(x.dtype),
    lambda x, y: (x.float() * y.float()).to(x.dtype),
]


@pytest.mark.parametrize("which", range(4), ids=["min", "max or NaN", "add", "multiply"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pairs(dtype: torch.dtype, which: int) -> None:
    special = [0.0, -0.0, 1.0, -1.0, float("inf"), float("-inf"), float("nan"), 1e-7, -6e-8, 3e-39, -1e-40]
    numbers = torch.tensor(special).to(dtype)
    a, b = (t.flatten() for t in torch.meshgrid(numbers, numbers, indexing="ij"))
    g = torch.Generator().manual_seed(3)
    random = torch.randint(-(2**15), 2**15, (2, 400), generator=g).to(torch.int16).view(dtype)
    a, b = torch.cat((a, random[0])), torch.cat((b, random[1]))
    bfloat, kind = ctypes.c_int64(dtype == torch.bfloat16), ctypes.c_int64(which)
    words = [
        emulation().resq_pairs(bfloat, kind, *(ctypes.c_uint32(_word(v[i : i + 2])) for v in (a, b)))
        for i in range(0, len(a) - 1, 2)
    ]
    halves = torch.tensor([half for word in words for half in (word & 0xFFFF, word >> 16)])
    ours, expected = halves.to(torch.uint16).view(dtype), PAIRS[which](a, b)[: len(halves)]
    torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)
    if which >= 2:  # of a 0 and a -0, min and max may be either here
        numbers = ~expected.isnan()
        assert torch.equal(ours[numbers].view(torch.int16), expected[numbers].view(torch.int16))


def test_products_of_bfloat16s_rounded_once_are_those_rounded_to_float32_first() -> None:
    # All significands, and exponents around those where float32 and bfloat16 have ever fewer bits.
    bits = torch.arange(128, 256).double()
    exact = (bits[:, None] * bits).unique()[:, None] * 2.0 ** torch.arange(-154, -138).double()
    least = 2.0**-133
    once = torch.where(exact < 2.0**-126, (exact / least).round() * least, exact)
    assert (exact.float().double() != exact).any()
    assert torch.equal(exact.float().bfloat16(), once.bfloat16())
