"""One tile of packed tokens against a block of query rows: scores, online softmax, weighted values.

Everything is transposed: scores are [tokens, rows] = codes·qᵀ and the output is [dims, rows] = codesᵀ·Pᵀ, so the codes
are the first operand, which tensor cores take from registers, and few query rows need no padding to 16.

Loads bring 32-bit words as they lie in the page (16-byte pieces, 64 or more contiguous bytes): packed words wait in
shared memory and are laid out for the tensor cores, and codes are unpacked in registers. For that the dims of the inner
product go nibble by nibble of all words, [8, words], and the tokens of a tile 4 by 4: index j·N/4 + i is token 4·i + j,
as a word of the values holds 4 tokens; then a register's shifts are constants.

Algebra, per part with scale s_n and zero point z_n of token n, c_n the codes:
    score[n, m]  = s_n·(c_n·q_m − z_n·Σ q_m)                     two sums of products, each scaled once per score
    output[m]    = Σ_n p'[n, m]·c_n − Σ_n p'[n, m]·z_n,  p' = p·s_n rounded to bf16 in both sums
A 4-bit code enters as 128 + c (see arithmetic), so 128 is added to z. The value sums are cleared of it tile by tile,
before the float32 accumulation: the truncation of tensor-core sums cannot grow with the context.
"""

# ruff: noqa: RUF005 (Triton has no starred expressions)

from __future__ import annotations

import triton
import triton.language as tl

from resq_vllm.gpu_kv.arithmetic import as_bf16, byte_value, loaded_bf16, nibble_plus_128
from resq_vllm.gpu_kv.page import key_nibble_dim
from resq_vllm.gpu_kv.scales import load_scales


@triton.jit
def load_query(rows, valid, P: tl.constexpr):
    """Query rows as operands of the scores: low [8·words or 4·words, M], high [4·words, M], and Σ q of each [M].

    rows [1, M]: pointers to the rotated query's first dims; valid [1, M].
    """
    index = tl.arange(0, P.key_words * (32 // P.low_bits))[:, None]
    word = index % P.key_words
    dim = key_nibble_dim(word, index // P.key_words) if P.low_bits == 4 else word * 4 + index // P.key_words
    low = loaded_bf16(tl.load(rows + dim, mask=valid & (word < P.low_width // 4) & (dim < P.low), other=0.0))
    query = (low, tl.sum(low.to(tl.float32), 0))
    if P.high > 0:
        index = tl.arange(0, P.high_words * 4)[:, None]
        dim = (index % P.high_words) * 4 + index // P.high_words
        high = loaded_bf16(tl.load(rows + P.low + dim, mask=valid & (dim < P.high), other=0.0))
        query = query + (high, tl.sum(high.to(tl.float32), 0))
    return query


@triton.jit
def start_state(M: tl.constexpr, P: tl.constexpr):
    """Running maximum (base 2), sum of probabilities [M], and the accumulators [dims, M]: low, high."""
    # Named, since Triton 3.6 takes no attribute of a constexpr as a shape.
    low_dims: tl.constexpr = (2 if P.low_bits == 4 else 1) * P.lanes
    high_dims: tl.constexpr = P.high_dims
    sums = (tl.zeros((low_dims, M), tl.float32),)
    if P.high > 0:
        sums = sums + (tl.zeros((high_dims, M), tl.float32),)
    return tl.full((M,), float("-inf"), tl.float32), tl.zeros((M,), tl.float32), sums


@triton.jit
def _tokens_of(packed, BITS: tl.constexpr, Q: tl.constexpr):
    """[4·Q], index j·Q + i: field j of ``BITS`` bits of packed [Q]."""
    shift = tl.arange(0, 4)[:, None] * BITS
    return tl.reshape(packed[None, :] >> shift.to(packed.dtype), (4 * Q,))


@triton.jit
def _scale_zero(scales, zeros, row: tl.constexpr, OFFSET: tl.constexpr):
    """float32 [4·Q]: scales of the tile's tokens, and their zero points plus OFFSET."""
    Q: tl.constexpr = scales[row].shape[0]
    scale = _tokens_of(scales[row], 16, Q).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    # Through float32's mantissa: 2^23 + z.
    zero = (_tokens_of(zeros[row], 8, Q) & 0xFF) | 0x4B000000
    return scale, zero.to(tl.float32, bitcast=True) - (8388608.0 - OFFSET)


@triton.jit
def _pointers(base, shape: tl.constexpr):
    """Word pointers of bytes base [Q] (in the shape of the tile's load) or of one base."""
    words = base.to(tl.pointer_type(tl.uint32))
    if base.type.is_block():
        words = tl.reshape(words, shape)
    return words


@triton.jit
def _key_codes(base, quad, WIDTH: tl.constexpr, WORDS: tl.constexpr, BITS: tl.constexpr, Q: tl.constexpr):
    """[4·Q, 32/BITS·WORDS] operand of a key plane: inner index field·WORDS + word; 4-bit codes as 128 + c."""
    FIELDS: tl.constexpr = 32 // BITS
    word = tl.arange(0, WORDS)[:, None, None]
    token = tl.arange(0, 4)[None, None, :]
    place = ((quad // 4)[None, :, None] * (WIDTH // 4) + word) * 16 + (quad % 4 * 4)[None, :, None] + token
    words = tl.load(_pointers(base, (1, Q, 1)) + place, mask=word < WIDTH // 4, other=0)
    words = tl.reshape(tl.permute(words, (2, 1, 0)), (4 * Q, 1, WORDS))
    shift = (tl.arange(0, FIELDS) * BITS)[None, :, None]
    codes = nibble_plus_128(words, shift) if BITS == 4 else byte_value(words, shift)
    return tl.reshape(codes, (4 * Q, FIELDS * WORDS))


@triton.jit
def _value_codes(base, quad, WIDTH: tl.constexpr, LANES: tl.constexpr, BITS: tl.constexpr, Q: tl.constexpr):
    """[LANES·(8/BITS), 4·Q] operand of a value plane: outer index half·LANES + lane."""
    lane = tl.arange(0, LANES)[:, None]
    words = tl.load(_pointers(base, (1, Q)) + quad[None, :] * WIDTH + lane, mask=lane < WIDTH, other=0)
    token = tl.arange(0, 4)[None, None, :, None]
    if BITS == 4:
        half = tl.arange(0, 2)[:, None, None, None]
        codes = nibble_plus_128(tl.reshape(words, (1, LANES, 1, Q)), token * 8 + half * 4)
        result = tl.reshape(codes, (2 * LANES, 4 * Q))
    else:
        result = tl.reshape(byte_value(tl.reshape(words, (1, LANES, 1, Q)), token * 8), (LANES, 4 * Q))
    return result


@triton.jit
def _scores(query, page, quad, scales, zeros, P: tl.constexpr, Q: tl.constexpr):
    """float32 [4·Q, M], without the softmax scale."""
    OFFSET: tl.constexpr = 128.0 if P.low_bits == 4 else 0.0
    codes = _key_codes(page, quad, P.low_width, P.key_words, P.low_bits, Q)
    product = tl.dot(codes, query[0], input_precision="ieee")
    scale, zero = _scale_zero(scales, zeros, 0, OFFSET)
    scores = (product - zero[:, None] * query[1][None, :]) * scale[:, None]
    if P.high > 0:
        codes = _key_codes(page + P.key_high, quad, P.high_width, P.high_words, 8, Q)
        product = tl.dot(codes, query[2], input_precision="ieee")
        scale, zero = _scale_zero(scales, zeros, 1, 0.0)
        scores += (product - zero[:, None] * query[3][None, :]) * scale[:, None]
    return scores


@triton.jit
def _weighted(p, codes, scale, zero, there):
    """Σ_n p'·(c − z), float32 [dims, M]."""
    # A scale behind the sequence's end, or before its window in a page given up, may be anything, NaN included.
    weight = as_bf16(p * tl.where(there, scale, 0.0)[:, None])
    product = tl.dot(codes, weight, input_precision="ieee")
    return product - tl.sum(weight.to(tl.float32) * zero[:, None], 0)[None, :]


@triton.jit
def _values(p, sums, alpha, page, quad, scales, zeros, there, P: tl.constexpr, Q: tl.constexpr):
    """The accumulators after this tile. p [4·Q, M]; alpha [M]; there [4·Q]: tokens that some row may see."""
    OFFSET: tl.constexpr = 128.0 if P.low_bits == 4 else 0.0
    codes = _value_codes(page + P.value_low, quad, P.low_width, P.lanes, P.low_bits, Q)
    scale, zero = _scale_zero(scales, zeros, P.parts, OFFSET)
    result = (sums[0] * alpha[None, :] + _weighted(p, codes, scale, zero, there),)
    if P.high > 0:
        codes = _value_codes(page + P.value_high, quad, P.high_width, P.high_dims, 8, Q)
        scale, zero = _scale_zero(scales, zeros, P.parts + 1, 0.0)
        result = result + (sums[1] * alpha[None, :] + _weighted(p, codes, scale, zero, there),)
    return result


@triton.jit
def attend(
    query,  # of load_query
    state,  # of start_state
    cache,  # pointer to this kv head of block 0
    cache_block,
    table,  # pointer to this sequence's block table
    start,  # first token of the tile, a multiple of N
    length,  # the sequence's tokens
    position,  # [M]: the last token a row sees
    window,
    scale,  # of the softmax, times log2 e
    P: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    MASKED: tl.constexpr,  # False: every row sees every token of the tile
    WINDOWED: tl.constexpr,
):
    """The state after one more tile."""
    maximum, total, sums = state
    Q: tl.constexpr = N // 4
    quads = tl.arange(0, Q)
    first = start + 4 * quads
    seen = first < length
    index = tl.arange(0, N)
    token = start + (index % Q) * 4 + index // Q
    if P.tokens % N == 0:
        page = cache + tl.load(table + start // P.tokens).to(tl.int64) * cache_block
        quad = start % P.tokens // 4 + quads
    else:
        block = tl.load(table + first // P.tokens, mask=seen, other=0)
        page = cache + block.to(tl.int64) * cache_block
        quad = (first % P.tokens) // 4
    scales, zeros = load_scales(page, quad, seen, P)
    scores = _scores(query, page, quad, scales, zeros, P, Q) * scale
    if MASKED:
        visible = token[:, None] <= position[None, :]
        if WINDOWED:
            visible = visible & (token[:, None] > position[None, :] - window)
        scores = tl.where(visible, scores, float("-inf"))
    there = token < length
    if WINDOWED:
        there = there & (token > tl.min(position, 0) - window)
    new = tl.maximum(maximum, tl.max(scores, 0))
    # A row that has seen nothing yet keeps 0 everywhere instead of exp2(-inf + inf).
    finite = tl.where(new == float("-inf"), 0.0, new)
    p = tl.exp2(scores - finite[None, :])
    alpha = tl.exp2(maximum - finite)
    sums = _values(p, sums, alpha, page, quad, scales, zeros, there, P, Q)
    return new, total * alpha + tl.sum(p, 0), sums


@triton.jit
def store_dims(pointers, sums, factor, valid, P: tl.constexpr, STORE: tl.constexpr):
    """sums·factor at their dims. pointers [1, M]: of dim 0; factor, valid [1, M]; STORE(pointers, x, mask)."""
    halves: tl.constexpr = 2 if P.low_bits == 4 else 1
    index = tl.arange(0, halves * P.lanes)[:, None]
    lane = index % P.lanes
    dim = lane + index // P.lanes * P.low_width
    STORE(pointers + dim, sums[0] * factor, valid & (lane < P.low_width) & (dim < P.low))
    if P.high > 0:
        dim = tl.arange(0, P.high_dims)[:, None]
        STORE(pointers + P.low + dim, sums[1] * factor, valid & (dim < P.high))
