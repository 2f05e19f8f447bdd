"""bf16 operands of tl.dot: rounding, and codes to bf16 by bit patterns instead of conversions.

Triton's interpreter keeps bf16 as its 16 bits, multiplies those bits in tl.dot, and truncates where a GPU rounds.
Under it the same operands are float32 tensors whose values are bf16 numbers, so every product is the GPU's.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)

# ulp 1 at 2^23: adding and subtracting 1.5·2^23 rounds half to even, as torch.round does, up to 2^22 in magnitude.
_ROUNDER: tl.constexpr = tl.constexpr(12582912.0)


@triton.jit
def as_bf16(x):
    """float32 -> bf16, half to even."""
    if INTERPRETED:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        return tl.where(x == x, rounded, x)
    return x.to(tl.bfloat16)


@triton.jit
def loaded_bf16(x):
    """A loaded bf16, float16 or float32 tensor as an operand."""
    return as_bf16(x.to(tl.float32))


@triton.jit
def nibble_plus_128(words, shift):
    """bf16 128 + n of the nibble n at bit ``shift``: bf16 has ulp 1 from 128 on, so n is its mantissa.

    One shift and one three-input logic operation; an integer conversion runs at a quarter of their rate.
    """
    bits = ((words >> shift) & 0xF) | 0x4300
    if INTERPRETED:
        return (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def byte_value(words, shift):
    """bf16 of the byte at bit ``shift``, exact, through float32's mantissa (2^23 + byte)."""
    bits = ((words >> shift) & 0xFF) | 0x4B000000
    return as_bf16(bits.to(tl.float32, bitcast=True) - 8388608.0)


@triton.jit
def round_half_even(x):
    """Exact for |x| <= 2^22; a larger x stays as large, for the clamp that follows."""
    return (x + _ROUNDER) - _ROUNDER


@triton.jit
def store_rounded(pointer, x, mask):
    """Store float32 ``x`` as the pointer's type, half to even in the interpreter, too."""
    if pointer.dtype.element_ty == tl.bfloat16:
        tl.store(pointer, as_bf16(x).to(tl.bfloat16), mask=mask)
    else:
        tl.store(pointer, x.to(pointer.dtype.element_ty), mask=mask)
