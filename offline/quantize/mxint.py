"""MXINT: blocks of integers with one power-of-two exponent (OCP Microscaling; arXiv 2402.02446: blocks of 16).

A block whose largest magnitude is m has the exponent e = floor(log2 m), and every element the nearest multiple of
2^(e − b + 2) within ±(2^(b−1) − 1) of them: b bits with the sign, so the element 1.00… of MXINT8 is 64·2^−6.
"""

from __future__ import annotations

import torch

BLOCK = 16
# The shared exponent is E8M0, eight bits with a bias of 127.
EXPONENTS = (-127, 127)


def mxint(x: torch.Tensor, bits: int = 4, block: int = BLOCK) -> torch.Tensor:
    """The values that ``x`` [..., K] rounds to (half to even), float32 of the same shape.

    Args:
        x: any float type; blocks run along the last dim, the last one is shorter where ``block`` does not divide K.
        bits: of an element, sign included: 2 to 16.
        block: elements that share an exponent.

    """
    columns = x.shape[-1]
    padded = torch.nn.functional.pad(x.float(), (0, -columns % block))
    blocks = padded.unflatten(-1, (-1, block))
    # frexp: m = f·2^exponent with f in [0.5, 1), and exponent 0 for a block of zeros.
    exponent = torch.frexp(blocks.abs().amax(-1, keepdim=True)).exponent - 1
    shift = bits - 2 - exponent.clamp(*EXPONENTS)
    largest = float(2 ** (bits - 1) - 1)
    # In float64, where neither 2^shift nor the product leaves the range of normal numbers.
    power = torch.exp2(shift.double())
    values = (blocks.double() * power).round_().clamp_(-largest, largest) / power
    return values.float().flatten(-2)[..., :columns]


def mxint_bits(bits: int, block: int = BLOCK) -> float:
    """Bits an element with its share of the block's exponent: 4.5 at 4 bits in blocks of 16."""
    return bits + 8 / block
