"""The packed KV page: one (block, kv head), N tokens, as planes inside N·C contiguous bytes.

Planes, in this order (t token, hp/lp the padded widths of the high and low parts):

=====  =====================  ==========================================================================
plane  bytes                  place of token t
=====  =====================  ==========================================================================
K low  N·lp/2 (4 bit)         4 bytes at ((t/16)·(lp/8)+g)·64 + (t%16)·4; byte j = k[8g+j] | k[8g+4+j]<<4
K high N·hp                   4 bytes at ((t/16)·(hp/4)+g)·64 + (t%16)·4; byte j = k_high[4g+j]
V low  N·lp/2 (4 bit)         byte ((t/4)·(lp/2)+c)·4 + t%4 = v[c] | v[c+lp/2]<<4
V high N·hp                   byte ((t/4)·hp+c)·4 + t%4 = v_high[c]
scales N·2·parts float16      K [parts][N], then V [parts][N]
zeros  N·2·parts uint8        K [parts][N], then V [parts][N]
=====  =====================  ==========================================================================

K is laid out like the integer GEMM's weights with N = token (16 tokens × 4 dims = one 64-byte vector), V with one
32-bit word per dim over 4 tokens. Both nibbles of a byte belong to one token, so an append never reads before it
writes: two tokens of a page can be written by different threads. An 8-bit low part is stored like a high part.
"""

from __future__ import annotations

from dataclasses import dataclass

from resq_vllm.errors import ResQError

HIGH_BITS = 8
TOKENS_PER_TILE = 16


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class PagePlanes:
    """Byte offsets of the planes in a page, and the page's size in bytes."""

    key_low: int
    key_high: int
    value_low: int
    value_high: int
    scales: int
    zeros: int
    total: int


@dataclass(frozen=True)
class KVLayout:
    """Widths of one layer's packed KV cache.

    Attributes:
        head_dim: dims of a head.
        high: dims kept at 8 bits, the last ones of a head (0 = none).
        low_bits: bits of the other dims, 4 or 8.

    """

    head_dim: int
    high: int
    low_bits: int = 4

    def __post_init__(self) -> None:
        if self.low_bits not in (4, HIGH_BITS):
            raise ResQError(f"KV cache bits must be 4 or 8, not {self.low_bits}")
        if not 0 <= self.high < self.head_dim:
            raise ResQError(f"{self.high} high-precision dims do not fit a head of {self.head_dim} dims")

    @property
    def low(self) -> int:
        return self.head_dim - self.high

    @property
    def low_padded(self) -> int:
        """Low dims padded so that 8 of them fill a 32-bit word of nibbles; the padding's codes are 0."""
        return _round_up(self.low, 8)

    @property
    def high_padded(self) -> int:
        return _round_up(self.high, 4)

    @property
    def parts(self) -> int:
        """Scales per token and head for K (and as many for V)."""
        return 2 if self.high else 1

    @property
    def low_bytes(self) -> int:
        return self.low_padded * self.low_bits // 8

    @property
    def bytes_per_token(self) -> int:
        """C: bytes of K and V together for one token and kv head (84 at head_dim 64, 156 at 128; bf16: 256, 512)."""
        return 2 * (self.low_bytes + self.high_padded + 3 * self.parts)

    def planes(self, tokens: int) -> PagePlanes:
        """Plane offsets of a page of ``tokens`` tokens. Raises ResQError unless tokens is a multiple of 16."""
        if tokens % TOKENS_PER_TILE:
            raise ResQError(f"the packed KV cache needs a block size that is a multiple of 16, not {tokens}")
        low, high = tokens * self.low_bytes, tokens * self.high_padded
        scales = 2 * (low + high)
        zeros = scales + 4 * self.parts * tokens
        return PagePlanes(0, low, low + high, 2 * low + high, scales, zeros, zeros + 2 * self.parts * tokens)
