"""Nibble packing of checkpoint weights: byte j of a row holds column 2j (low nibble) and column 2j+1 (high nibble)."""

from __future__ import annotations

import torch


def pack_int4(codes: torch.Tensor) -> torch.Tensor:
    """int8 [..., K] with values in [-8, 7] and K even -> uint8 [..., K/2], two's-complement nibbles."""
    nibbles = codes.to(torch.uint8) & 0x0F
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [..., K/2] -> int8 [..., K] with values in [-8, 7]; the inverse of :func:`pack_int4`."""
    nibbles = torch.stack((packed & 0x0F, packed >> 4), dim=-1).flatten(-2).to(torch.int8)
    return torch.where(nibbles > 7, nibbles - 16, nibbles)
