"""One tile of packed tokens against many query rows: keys and values dequantized once a tile, then plain products.

With 128 rows a tile's codes are used often enough to be worth two more operations each, K̂ = s·(c − z), which free
every score from scales and zero points. The operands are float16: 1024 + c has ulp 1, so a 4- or 8-bit code is its
mantissa, c − z is exact, the float16 scale of the page multiplies it with one rounding of 2^-11, and a probability is
at most 1. (bf16 would round the scale itself.) Dequantized keys, values and the query are thus held to ±65504.

Tile orders are those of resq_vllm.gpu_kv.tile, but tokens keep theirs: a word of the values is 4 neighbouring rows.
"""

# ruff: noqa: RUF005 (Triton has no starred expressions)

from __future__ import annotations

import triton
import triton.language as tl

from resq_vllm.gpu_kv.page import key_nibble_dim
from resq_vllm.gpu_kv.scales import load_scales

_FLOAT16_MAX: tl.constexpr = tl.constexpr(65504.0)


@triton.jit
def _float16(x, factor):
    return tl.minimum(tl.maximum(x.to(tl.float32) * factor, -_FLOAT16_MAX), _FLOAT16_MAX).to(tl.float16)


@triton.jit
def load_query_block(rows, valid, scale, P: tl.constexpr):
    """Query rows times scale (the softmax's, times log2 e): float16 low [M, 8·words or 4·words], high [M, 4·words].

    rows [M, 1]: pointers to the rotated query's first dims; valid [M, 1].
    """
    index = tl.arange(0, P.key_words * (32 // P.low_bits))[None, :]
    word = index % P.key_words
    dim = key_nibble_dim(word, index // P.key_words) if P.low_bits == 4 else word * 4 + index // P.key_words
    query = (_float16(tl.load(rows + dim, mask=valid & (word < P.low_width // 4) & (dim < P.low), other=0.0), scale),)
    if P.high > 0:
        index = tl.arange(0, P.high_words * 4)[None, :]
        dim = (index % P.high_words) * 4 + index // P.high_words
        query = query + (_float16(tl.load(rows + P.low + dim, mask=valid & (dim < P.high), other=0.0), scale),)
    return query


@triton.jit
def start_block(M: tl.constexpr, P: tl.constexpr):
    """Running maximum (base 2), sum of probabilities [M], and the accumulators [M, dims]: low, high."""
    # Named, since Triton 3.6 takes no attribute of a constexpr as a shape.
    low_dims: tl.constexpr = (2 if P.low_bits == 4 else 1) * P.lanes
    high_dims: tl.constexpr = P.high_dims
    sums = (tl.zeros((M, low_dims), tl.float32),)
    if P.high > 0:
        sums = sums + (tl.zeros((M, high_dims), tl.float32),)
    return tl.full((M,), float("-inf"), tl.float32), tl.zeros((M,), tl.float32), sums


@triton.jit
def _float16_codes(words, shift, MASK: tl.constexpr):
    """float16 1024 + c."""
    return (((words >> shift) & MASK) | 0x6400).to(tl.uint16).to(tl.float16, bitcast=True)


@triton.jit
def _scale_zero(scales, zeros, there, row: tl.constexpr):
    """float16 [N]: scales, 0 where no row may look (whatever lies there), and 1024 + zero points."""
    N: tl.constexpr = there.shape[0]
    j = tl.arange(0, 4)[None, :]
    scale = tl.reshape(scales[row][:, None] >> (16 * j).to(tl.uint64), (N,)).to(tl.uint16).to(tl.float16, bitcast=True)
    zero = (tl.reshape(zeros[row][:, None] >> (8 * j).to(tl.uint32), (N,)) & 0xFF) | 0x6400
    return tl.where(there, scale, 0.0), zero.to(tl.uint16).to(tl.float16, bitcast=True)


@triton.jit
def _keys(plane, token, scale, zero, WIDTH: tl.constexpr, WORDS: tl.constexpr, BITS: tl.constexpr):
    """float16 [32/BITS·WORDS, N]: dequantized keys of a part. plane: pointers to its bytes, [N] or one."""
    FIELDS: tl.constexpr = 32 // BITS
    N: tl.constexpr = token.shape[0]
    word = tl.arange(0, WORDS)[:, None]
    pointers = plane.to(tl.pointer_type(tl.uint32))
    if plane.type.is_block():
        pointers = pointers[None, :]
    place = ((token // 16)[None, :] * (WIDTH // 4) + word) * 16 + (token % 16)[None, :]
    words = tl.load(pointers + place, mask=word < WIDTH // 4, other=0)
    shift = (tl.arange(0, FIELDS) * BITS)[:, None, None]
    codes = _float16_codes(tl.reshape(words, (1, WORDS, N)), shift, (1 << BITS) - 1)
    return tl.reshape((codes - zero[None, None, :]) * scale[None, None, :], (FIELDS * WORDS, N))


@triton.jit
def _values(plane, quad, scale, zero, WIDTH: tl.constexpr, LANES: tl.constexpr, BITS: tl.constexpr):
    """float16 [N, 8/BITS·LANES]: dequantized values of a part; columns half·LANES + lane. plane: [N/4] or one."""
    HALVES: tl.constexpr = 8 // BITS
    Q: tl.constexpr = quad.shape[0]
    lane = tl.arange(0, LANES)[None, :]
    pointers = plane.to(tl.pointer_type(tl.uint32))
    if plane.type.is_block():
        pointers = pointers[:, None]
    words = tl.load(pointers + quad[:, None] * WIDTH + lane, mask=lane < WIDTH, other=0)
    shift = tl.arange(0, 4)[None, :, None, None] * 8 + tl.arange(0, HALVES)[None, None, :, None] * BITS
    codes = _float16_codes(tl.reshape(words, (Q, 1, 1, LANES)), shift, (1 << BITS) - 1)
    codes = tl.reshape(codes, (4 * Q, HALVES * LANES))
    return (codes - zero[:, None]) * scale[:, None]


@triton.jit
def attend_block(
    query,  # of load_query_block
    state,  # of start_block
    cache,  # pointer to this kv head of block 0
    cache_block,
    table,  # pointer to this sequence's block table
    start,  # first token of the tile, a multiple of N
    length,  # the sequence's tokens
    position,  # [M]: the last token a row sees
    window,
    P: tl.constexpr,
    N: tl.constexpr,
    MASKED: tl.constexpr,  # False: every row sees every token of the tile
    WINDOWED: tl.constexpr,
):
    """The state after one more tile."""
    maximum, total, sums = state
    token = start + tl.arange(0, N)
    quads = start // 4 + tl.arange(0, N // 4)
    there = token < length
    seen = there
    if WINDOWED:
        seen = there & (token > tl.min(position, 0) - window)
    if P.tokens % N == 0:
        page = cache + tl.load(table + start // P.tokens).to(tl.int64) * cache_block
        quad_page = page
    else:
        page = cache + tl.load(table + token // P.tokens, mask=there, other=0).to(tl.int64) * cache_block
        block = tl.load(table + quads // (P.tokens // 4), mask=quads * 4 < length, other=0)
        quad_page = cache + block.to(tl.int64) * cache_block
    in_page, quad = token % P.tokens, quads % (P.tokens // 4)
    scales, zeros = load_scales(quad_page, quad, quads * 4 < length, P)
    key_scale, key_zero = _scale_zero(scales, zeros, there, 0)
    keys = _keys(page, in_page, key_scale, key_zero, P.low_width, P.key_words, P.low_bits)
    scores = tl.dot(query[0], keys, input_precision="ieee")
    if P.high > 0:
        key_scale, key_zero = _scale_zero(scales, zeros, there, 1)
        keys = _keys(page + P.key_high, in_page, key_scale, key_zero, P.high_width, P.high_words, 8)
        scores = tl.dot(query[1], keys, scores, input_precision="ieee")
    if MASKED:
        visible = token[None, :] <= position[:, None]
        if WINDOWED:
            visible = visible & (token[None, :] > position[:, None] - window)
        scores = tl.where(visible, scores, float("-inf"))
    new = tl.maximum(maximum, tl.max(scores, 1))
    # A row that has seen nothing yet keeps 0 everywhere instead of exp2(-inf + inf).
    finite = tl.where(new == float("-inf"), 0.0, new)
    p = tl.exp2(scores - finite[:, None])
    alpha = tl.exp2(maximum - finite)
    weight = p.to(tl.float16)
    value_scale, value_zero = _scale_zero(scales, zeros, seen, P.parts)
    values = _values(quad_page + P.value_low, quad, value_scale, value_zero, P.low_width, P.lanes, P.low_bits)
    result = (tl.dot(weight, values, sums[0] * alpha[:, None], input_precision="ieee"),)
    if P.high > 0:
        value_scale, value_zero = _scale_zero(scales, zeros, seen, P.parts + 1)
        values = _values(quad_page + P.value_high, quad, value_scale, value_zero, P.high_width, P.high_dims, 8)
        result = result + (tl.dot(weight, values, sums[1] * alpha[:, None], input_precision="ieee"),)
    return new, total * alpha + tl.sum(p, 1), result


@triton.jit
def store_block(pointers, sums, factor, valid, P: tl.constexpr, STORE: tl.constexpr):
    """sums·factor at their dims. pointers [M, 1]: of dim 0; factor, valid [M, 1]; STORE(pointers, x, mask)."""
    halves: tl.constexpr = 2 if P.low_bits == 4 else 1
    index = tl.arange(0, halves * P.lanes)[None, :]
    lane = index % P.lanes
    dim = lane + index // P.lanes * P.low_width
    STORE(pointers + dim, sums[0] * factor, valid & (lane < P.low_width) & (dim < P.low))
    if P.high > 0:
        dim = tl.arange(0, P.high_dims)[None, :]
        STORE(pointers + P.low + dim, sums[1] * factor, valid & (dim < P.high))
