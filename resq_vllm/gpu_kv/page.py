"""What the kernels know of a page at compile time, and where its bytes lie (resq_vllm.formats.kv_layout)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import triton
import triton.language as tl

from resq_vllm.formats.kv_layout import KVLayout

# tl.dot's operands are at least 16 wide.
SMALLEST_DOT = 16


def _power_of_two(n: int, least: int = SMALLEST_DOT) -> int:
    return max(least, 1 << max(n - 1, 0).bit_length())


@dataclass(frozen=True)
class Page:
    """Compile-time constants of one layout and block size: a single constexpr argument of every kernel.

    Attributes:
        tokens: N, a multiple of 16.
        head_dim, low, high, parts: as in KVLayout.
        low_bits: 4 or 8.
        low_width, high_width: bytes a token in a low and in a high plane (multiples of 4).
        key_high, value_low, value_high, scales, zeros: byte offsets of the planes; the keys' low plane is at 0.
        dims: head_dim rounded up to a power of two.
        lanes: low_width rounded up to a power of two (columns of a tile of the values' low plane).
        high_dims: high_width rounded up to a power of two.
        key_words, high_words: words of 4 bytes a token in a key plane, rounded up to a power of two that is deep enough
            for a product of their codes.

    """

    tokens: int
    head_dim: int
    low: int
    high: int
    parts: int
    low_bits: int
    low_width: int
    high_width: int
    key_high: int
    value_low: int
    value_high: int
    scales: int
    zeros: int
    dims: int
    lanes: int
    high_dims: int
    key_words: int
    high_words: int


@cache
def page_of(head_dim: int, high: int, low_bits: int, tokens: int) -> Page:
    """The page of ``tokens`` tokens. Raises ResQError where KVLayout does."""
    layout = KVLayout(head_dim, high, low_bits)
    at = layout.planes(tokens)
    return Page(
        tokens=tokens,
        head_dim=head_dim,
        low=layout.low,
        high=high,
        parts=layout.parts,
        low_bits=low_bits,
        low_width=layout.low_bytes,
        high_width=layout.high_padded,
        key_high=at.key_high,
        value_low=at.value_low,
        value_high=at.value_high,
        scales=at.scales,
        zeros=at.zeros,
        dims=_power_of_two(head_dim),
        lanes=_power_of_two(layout.low_bytes),
        high_dims=_power_of_two(layout.high_padded),
        key_words=_power_of_two(layout.low_bytes // 4, SMALLEST_DOT * low_bits // 32),
        high_words=_power_of_two(layout.high_padded // 4, SMALLEST_DOT // 4),
    )


@triton.jit
def key_byte(token, byte, WIDTH: tl.constexpr):
    """Offset in a key plane of ``WIDTH`` bytes a token: 16 tokens × 4 bytes are 64 contiguous bytes."""
    return ((token // 16) * (WIDTH // 4) + byte // 4) * 64 + (token % 16) * 4 + byte % 4


@triton.jit
def value_byte(token, lane, WIDTH: tl.constexpr):
    """Offset in a value plane of ``WIDTH`` bytes a token: one 32-bit word per lane over 4 tokens."""
    return ((token // 4) * WIDTH + lane) * 4 + token % 4


@triton.jit
def key_word(token, word, WIDTH: tl.constexpr):
    """:func:`key_byte` in words of 4 bytes of one token."""
    return ((token // 16) * (WIDTH // 4) + word) * 16 + token % 16


@triton.jit
def key_nibble_dim(word, nibble):
    """The dim that nibble 0…7 of a low word holds: byte j is k[8g+j] | k[8g+4+j] << 4."""
    return word * 8 + (nibble % 2) * 4 + nibble // 2
