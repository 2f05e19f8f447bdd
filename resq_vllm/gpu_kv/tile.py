"""One tile of packed tokens against a block of query rows: scores, online softmax, weighted values.

Loads bring 32-bit words as they lie in the page (16-byte pieces, 64 or more contiguous bytes), so it is the packed
words that wait in shared memory and are laid out for the tensor cores; codes are unpacked in registers afterwards.
Each of a word's nibbles (bytes) is an operand of its own: 8 small products of depth ``words``, no shuffle.

Algebra, per part with scale s_n and zero point z_n of token n, c_n the codes:
    score[m, n]  = s_n·(q_m·c_n − z_n·Σ q_m)                     two accumulators, scaled once per score
    output[m]    = Σ_n p'[m, n]·c_n − Σ_n p'[m, n]·z_n,  p' = p·s_n rounded to bf16 in both sums
A 4-bit code enters as 128 + c (see arithmetic), so 128 is added to z. The value sums are cleared of it tile by tile,
before the float32 accumulation: the truncation of tensor-core sums cannot grow with the context.

A tile's column n is its token (n mod N/4)·4 + n div (N/4): then the probabilities of the tokens ≡ j (mod 4), which
share the words of the values, are a contiguous quarter of the columns.
"""

# ruff: noqa: RUF005 (Triton has no starred expressions)

from __future__ import annotations

import triton
import triton.language as tl

from resq_vllm.gpu_kv.arithmetic import as_bf16, byte_value, loaded_bf16, nibble_plus_128
from resq_vllm.gpu_kv.page import key_nibble_dim


@triton.jit
def load_query(rows, valid, P: tl.constexpr):
    """Query rows as operands of the scores: a tuple for the low part, one for the high part, and Σ q of each [M].

    rows [M, 1]: pointers to the rotated query's first dims; valid [M, 1].
    """
    row = tl.arange(0, P.key_rows)[None, :]
    word = row // P.key_repeat
    low = ()
    low_sum = tl.zeros((valid.shape[0],), tl.float32)
    for step in tl.static_range(32 // P.low_bits // P.key_repeat):
        if P.low_bits == 4:
            dim = key_nibble_dim(word, step * P.key_repeat + row % P.key_repeat)
        else:
            dim = word * 4 + step * P.key_repeat + row % P.key_repeat
        q = loaded_bf16(tl.load(rows + dim, mask=valid & (word < P.low_width // 4) & (dim < P.low), other=0.0))
        low_sum += tl.sum(q.to(tl.float32), 1)
        low = low + (q,)
    high = ()
    high_sum = tl.zeros((valid.shape[0],), tl.float32)
    if P.high > 0:
        high_row = tl.arange(0, P.high_rows)[None, :]
        for step in tl.static_range(4 // P.high_repeat):
            dim = (high_row // P.high_repeat) * 4 + step * P.high_repeat + high_row % P.high_repeat
            q = loaded_bf16(tl.load(rows + P.low + dim, mask=valid & (dim < P.high), other=0.0))
            high_sum += tl.sum(q.to(tl.float32), 1)
            high = high + (q,)
    return low, high, low_sum, high_sum


@triton.jit
def start_state(M: tl.constexpr, P: tl.constexpr):
    """Running maximum (base 2), sum of probabilities, and the accumulators: low (its halves at 4 bits), high."""
    sums = (tl.zeros((M, P.lanes), tl.float32),)
    if P.low_bits == 4:
        sums = sums + (tl.zeros((M, P.lanes), tl.float32),)
    if P.high > 0:
        sums = sums + (tl.zeros((M, P.high_dims), tl.float32),)
    return tl.full((M,), float("-inf"), tl.float32), tl.zeros((M,), tl.float32), sums


@triton.jit
def _scales_zeros(page, quad, seen, row, P: tl.constexpr):
    """Of the tile's groups of 4 tokens: four float16 scales in 64 bits [Q] and four zero points in 32 bits [Q].

    row: of the scale planes. page: pointers [Q] or one; quad [Q]: in its page; seen [Q]: begins before the end.
    """
    scales = (page + (P.scales + 2 * row * P.tokens)).to(tl.pointer_type(tl.uint64))
    zeros = (page + (P.zeros + row * P.tokens)).to(tl.pointer_type(tl.uint32))
    return tl.load(scales + quad, mask=seen, other=0), tl.load(zeros + quad, mask=seen, other=0)


@triton.jit
def _scale(packed, j):
    """float32 [Q]: the scales of the tokens ≡ j (mod 4)."""
    return (packed >> (16 * j)).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _zero(packed, j, OFFSET: tl.constexpr):
    """float32 [Q]: their zero points plus OFFSET, through float32's mantissa."""
    return (((packed >> (8 * j)) & 0xFF) | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 - OFFSET)


@triton.jit
def _key_words(base, quad, word, valid, WIDTH: tl.constexpr, ROWS: tl.constexpr, Q: tl.constexpr):
    """uint32 [ROWS, 4·Q]: a key plane's words, column j·Q + i being token 4·i + j. base [Q] or one: pointers to bytes."""
    token = tl.arange(0, 4)[None, None, :]
    place = ((quad // 4)[None, :, None] * (WIDTH // 4) + word[:, :, None]) * 16 + (quad % 4 * 4)[None, :, None] + token
    pointers = base.to(tl.pointer_type(tl.uint32))
    if base.type.is_block():
        pointers = pointers[None, :, None]
    words = tl.load(pointers + place, mask=valid[:, :, None], other=0)
    return tl.reshape(tl.permute(words, (0, 2, 1)), (ROWS, 4 * Q))


@triton.jit
def _value_words(base, quad, lane, WIDTH: tl.constexpr):
    """uint32 [Q, lanes]: a value plane's words, each one lane of 4 tokens."""
    pointers = base.to(tl.pointer_type(tl.uint32))
    if base.type.is_block():
        pointers = pointers[:, None]
    return tl.load(pointers + quad[:, None] * WIDTH + lane, mask=lane < WIDTH, other=0)


@triton.jit
def _key_products(q, words, shift, STEPS: tl.constexpr, REPEAT: tl.constexpr, BITS: tl.constexpr):
    """q·codes float32 [M, N]; a 4-bit code counts as 128 + c. words [rows, N]; shift [rows, 1]: of a row's first."""
    total = tl.zeros((q[0].shape[0], words.shape[1]), tl.float32)
    for step in tl.static_range(STEPS):
        if BITS == 4:
            codes = nibble_plus_128(words, shift + 4 * REPEAT * step)
        else:
            codes = byte_value(words, shift + 8 * REPEAT * step)
        total = tl.dot(q[step], codes, total, input_precision="ieee")
    return total


@triton.jit
def _quarters(x, M: tl.constexpr, Q: tl.constexpr):
    """[M, 4·Q] -> four [M, Q]: the columns of the tokens ≡ 0, 1, 2, 3 (mod 4)."""
    pairs = tl.reshape(tl.permute(tl.reshape(x, (M, 4, Q)), (0, 2, 1)), (M, Q, 2, 2))
    even, odd = tl.split(pairs)
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _scores(query, page, quad, seen, P: tl.constexpr, M: tl.constexpr, Q: tl.constexpr):
    """Four float32 [M, Q], without the softmax scale."""
    low, high, low_sum, high_sum = query
    row = tl.arange(0, P.key_rows)[:, None]
    word = row // P.key_repeat
    STEPS: tl.constexpr = 32 // P.low_bits // P.key_repeat
    OFFSET: tl.constexpr = 128.0 if P.low_bits == 4 else 0.0
    words = _key_words(page, quad, word, word < P.low_width // 4, P.low_width, P.key_rows, Q)
    product = _key_products(low, words, (row % P.key_repeat) * P.low_bits, STEPS, P.key_repeat, P.low_bits)
    scales, zeros = _scales_zeros(page, quad, seen, 0, P)
    quarters = _quarters(product, M, Q)
    result = ()
    for j in tl.static_range(4):
        part = (quarters[j] - low_sum[:, None] * _zero(zeros, j, OFFSET)[None, :]) * _scale(scales, j)[None, :]
        result = result + (part,)
    if P.high > 0:
        high_row = tl.arange(0, P.high_rows)[:, None]
        high_word = high_row // P.high_repeat
        HIGH_STEPS: tl.constexpr = 4 // P.high_repeat
        words = _key_words(
            page + P.key_high, quad, high_word, high_word < P.high_width // 4, P.high_width, P.high_rows, Q
        )
        product = _key_products(high, words, (high_row % P.high_repeat) * 8, HIGH_STEPS, P.high_repeat, 8)
        scales, zeros = _scales_zeros(page, quad, seen, 1, P)
        quarters = _quarters(product, M, Q)
        total = ()
        for j in tl.static_range(4):
            part = (quarters[j] - high_sum[:, None] * _zero(zeros, j, 0.0)[None, :]) * _scale(scales, j)[None, :]
            total = total + (result[j] + part,)
        result = total
    return result


@triton.jit
def _values(p, sums, alpha, page, quad, seen, P: tl.constexpr, M: tl.constexpr):
    """The accumulators after this tile. p: four [M, Q]; alpha [M, 1]."""
    OFFSET: tl.constexpr = 128.0 if P.low_bits == 4 else 0.0
    scales, zeros = _scales_zeros(page, quad, seen, P.parts, P)
    words = _value_words(page + P.value_low, quad, tl.arange(0, P.lanes)[None, :], P.low_width)
    first = tl.zeros((M, P.lanes), tl.float32)
    second = tl.zeros((M, P.lanes), tl.float32)
    offset = tl.zeros((M,), tl.float32)
    for j in tl.static_range(4):
        weight = as_bf16(p[j] * _scale(scales, j)[None, :])
        offset += tl.sum(weight.to(tl.float32) * _zero(zeros, j, OFFSET)[None, :], 1)
        if P.low_bits == 4:
            first = tl.dot(weight, nibble_plus_128(words, 8 * j), first, input_precision="ieee")
            second = tl.dot(weight, nibble_plus_128(words, 8 * j + 4), second, input_precision="ieee")
        else:
            first = tl.dot(weight, byte_value(words, 8 * j), first, input_precision="ieee")
    result = (sums[0] * alpha + (first - offset[:, None]),)
    if P.low_bits == 4:
        result = result + (sums[1] * alpha + (second - offset[:, None]),)
    if P.high > 0:
        scales, zeros = _scales_zeros(page, quad, seen, P.parts + 1, P)
        words = _value_words(page + P.value_high, quad, tl.arange(0, P.high_dims)[None, :], P.high_width)
        third = tl.zeros((M, P.high_dims), tl.float32)
        offset = tl.zeros((M,), tl.float32)
        for j in tl.static_range(4):
            weight = as_bf16(p[j] * _scale(scales, j)[None, :])
            offset += tl.sum(weight.to(tl.float32) * _zero(zeros, j, 0.0)[None, :], 1)
            third = tl.dot(weight, byte_value(words, 8 * j), third, input_precision="ieee")
        result = result + (sums[len(sums) - 1] * alpha + (third - offset[:, None]),)
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
):
    """The state after one more tile."""
    maximum, total, sums = state
    Q: tl.constexpr = N // 4
    quads = tl.arange(0, Q)
    token = start + 4 * quads
    seen = token < length
    if P.tokens % N == 0:
        page = cache + tl.load(table + start // P.tokens).to(tl.int64) * cache_block
        quad = start % P.tokens // 4 + quads
    else:
        block = tl.load(table + token // P.tokens, mask=seen, other=0)
        page = cache + block.to(tl.int64) * cache_block
        quad = (token % P.tokens) // 4
    raw = _scores(query, page, quad, seen, P, M, Q)
    scores = ()
    new = maximum
    for j in tl.static_range(4):
        score = raw[j] * scale
        if MASKED:
            visible = token[None, :] + j <= position[:, None]
            if window > 0:
                visible = visible & (token[None, :] + j > position[:, None] - window)
            score = tl.where(visible, score, float("-inf"))
        scores = scores + (score,)
        new = tl.maximum(new, tl.max(score, 1))
    # A row that has seen nothing yet keeps 0 everywhere instead of exp2(-inf + inf).
    finite = tl.where(new == float("-inf"), 0.0, new)
    alpha = tl.exp2(maximum - finite)
    total = total * alpha
    p = ()
    for j in tl.static_range(4):
        probability = tl.exp2(scores[j] - finite[:, None])
        total += tl.sum(probability, 1)
        p = p + (probability,)
    sums = _values(p, sums, alpha[:, None], page, quad, seen, P, M)
    return new, total, sums


@triton.jit
def store_dims(pointers, sums, factor, valid, P: tl.constexpr, STORE: tl.constexpr):
    """sums·factor at their dims. pointers [M, 1]: of dim 0; factor, valid [M, 1]; STORE(pointers, x, mask)."""
    lane = tl.arange(0, P.lanes)[None, :]
    inside = valid & (lane < P.low_width)
    STORE(pointers + lane, sums[0] * factor, inside & (lane < P.low))
    if P.low_bits == 4:
        STORE(pointers + P.low_width + lane, sums[1] * factor, inside & (P.low_width + lane < P.low))
    if P.high > 0:
        dim = tl.arange(0, P.high_dims)[None, :]
        STORE(pointers + P.low + dim, sums[len(sums) - 1] * factor, valid & (dim < P.high))
