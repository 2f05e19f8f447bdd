"""Scales and zero points of a tile's tokens: two loads of words for all parts, so that they are copied ahead.

A float16 or a byte is narrower than an asynchronous copy; four tokens of them are 64 and 32 bits.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _rows(packed, P: tl.constexpr):
    """packed [2·parts, Q] -> a tuple of its rows [Q]: keys' low (and high), values' low (and high)."""
    Q: tl.constexpr = packed.shape[1]
    if P.parts == 2:
        even, odd = tl.split(tl.reshape(tl.permute(packed, (1, 0)), (Q, 2, 2)))
        key_low, value_low = tl.split(even)
        key_high, value_high = tl.split(odd)
        rows = (key_low, key_high, value_low, value_high)
    else:
        key_low, value_low = tl.split(tl.permute(packed, (1, 0)))
        rows = (key_low, value_low)
    return rows


@triton.jit
def load_scales(page, quad, seen, P: tl.constexpr):
    """Scales (float16 × 4 tokens in 64 bits) and zero points (4 in 32 bits) of all parts, each a tuple of [Q].

    page: pointers [Q] or one; quad [Q]: groups of 4 tokens in their page; seen [Q].
    """
    row = tl.arange(0, 2 * P.parts)[:, None] * (P.tokens // 4)
    scales = (page + P.scales).to(tl.pointer_type(tl.uint64))
    zeros = (page + P.zeros).to(tl.pointer_type(tl.uint32))
    if page.type.is_block():
        scales, zeros = scales[None, :], zeros[None, :]
    scale = tl.load(scales + (row + quad[None, :]), mask=seen[None, :], other=0)
    zero = tl.load(zeros + (row + quad[None, :]), mask=seen[None, :], other=0)
    return _rows(scale, P), _rows(zero, P)
