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

from __future__ import annotations

import triton
import triton.language as tl

from resq_vllm.gpu_kv.arithmetic import as_bf16, byte_value, loaded_bf16, nibble_plus_128
from resq_vllm.gpu_kv.page import Page, key_nibble_dim, key_word

WORD: tl.constexpr = tl.constexpr(tl.uint32)


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
def _scale_zero(page, token, seen, row, P: tl.constexpr):
    """Scale and zero point of the tile's tokens, float32; row: of the scale planes. A token not there has scale 0."""
    scales = (page + P.scales).to(tl.pointer_type(tl.float16))
    scale = tl.load(scales + row * P.tokens + token, mask=seen, other=0.0).to(tl.float32)
    return scale, tl.load(page + P.zeros + row * P.tokens + token, mask=seen, other=0).to(tl.float32)


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
def _scores(query, page, token, seen, P: tl.constexpr):
    """float32 [M, N], without the softmax scale. page: pointers [N] or one; token [N]: in its page."""
    low, high, low_sum, high_sum = query
    row = tl.arange(0, P.key_rows)[:, None]
    word = row // P.key_repeat
    words = tl.load(
        page.to(tl.pointer_type(WORD)) + key_word(token[None, :], word, P.low_width),
        mask=word < P.low_width // 4,
        other=0,
    )
    STEPS: tl.constexpr = 32 // P.low_bits // P.key_repeat
    scores = _key_products(low, words, (row % P.key_repeat) * P.low_bits, STEPS, P.key_repeat, P.low_bits)
    scale, zero = _scale_zero(page, token, seen, 0, P)
    if P.low_bits == 4:
        zero += 128.0
    scores = (scores - low_sum[:, None] * zero[None, :]) * scale[None, :]
    if P.high > 0:
        high_row = tl.arange(0, P.high_rows)[:, None]
        high_word = high_row // P.high_repeat
        high_words = tl.load(
            (page + P.key_high).to(tl.pointer_type(WORD)) + key_word(token[None, :], high_word, P.high_width),
            mask=high_word < P.high_width // 4,
            other=0,
        )
        product = _key_products(high, high_words, (high_row % P.high_repeat) * 8, 4 // P.high_repeat, P.high_repeat, 8)
        high_scale, high_zero = _scale_zero(page, token, seen, 1, P)
        scores += (product - high_sum[:, None] * high_zero[None, :]) * high_scale[None, :]
    return scores


@triton.jit
def _quarters(x, M: tl.constexpr, N: tl.constexpr):
    """[M, N] -> four [M, N/4]: the columns of the tokens ≡ 0, 1, 2, 3 (mod 4)."""
    pairs = tl.reshape(tl.permute(tl.reshape(x, (M, 4, N // 4)), (0, 2, 1)), (M, N // 4, 2, 2))
    even, odd = tl.split(pairs)
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _weighted(p, scale, zero, M: tl.constexpr, N: tl.constexpr):
    """Probabilities times the values' scale as operands (quarters), and what the zero points add up to, [M, 1]."""
    weight = as_bf16(p * scale[None, :])
    return _quarters(weight, M, N), tl.sum(weight.to(tl.float32) * zero[None, :], 1)[:, None]


@triton.jit
def _values(p, sums, alpha, page, quad_page, token, quad, seen, P: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """The accumulators after this tile. quad [N/4]: its groups of 4 tokens in their pages quad_page."""
    scale, zero = _scale_zero(page, token, seen, P.parts, P)
    if P.low_bits == 4:
        zero += 128.0
    weight, offset = _weighted(p, scale, zero, M, N)
    lane = tl.arange(0, P.lanes)[None, :]
    base = (quad_page + P.value_low).to(tl.pointer_type(WORD))
    place = quad[:, None] * P.low_width + lane
    if P.tokens % N == 0:
        words = tl.load(base + place, mask=lane < P.low_width, other=0)
    else:
        words = tl.load(base[:, None] + place, mask=lane < P.low_width, other=0)
    first = tl.zeros((M, P.lanes), tl.float32)
    second = tl.zeros((M, P.lanes), tl.float32)
    for j in tl.static_range(4):
        if P.low_bits == 4:
            first = tl.dot(weight[j], nibble_plus_128(words, 8 * j), first, input_precision="ieee")
            second = tl.dot(weight[j], nibble_plus_128(words, 8 * j + 4), second, input_precision="ieee")
        else:
            first = tl.dot(weight[j], byte_value(words, 8 * j), first, input_precision="ieee")
    result = (sums[0] * alpha + (first - offset),)
    if P.low_bits == 4:
        result = result + (sums[1] * alpha + (second - offset),)
    if P.high > 0:
        high_scale, high_zero = _scale_zero(page, token, seen, P.parts + 1, P)
        high_weight, high_offset = _weighted(p, high_scale, high_zero, M, N)
        high_lane = tl.arange(0, P.high_dims)[None, :]
        high_base = (quad_page + P.value_high).to(tl.pointer_type(WORD))
        high_place = quad[:, None] * P.high_width + high_lane
        if P.tokens % N == 0:
            high_words = tl.load(high_base + high_place, mask=high_lane < P.high_width, other=0)
        else:
            high_words = tl.load(high_base[:, None] + high_place, mask=high_lane < P.high_width, other=0)
        third = tl.zeros((M, P.high_dims), tl.float32)
        for j in tl.static_range(4):
            third = tl.dot(high_weight[j], byte_value(high_words, 8 * j), third, input_precision="ieee")
        result = result + (sums[len(result)] * alpha + (third - high_offset),)
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
    column = tl.arange(0, N)
    offset = (column % (N // 4)) * 4 + column // (N // 4)
    token = start + offset
    seen = token < length
    if P.tokens % N == 0:
        page = cache + tl.load(table + start // P.tokens).to(tl.int64) * cache_block
        quad_page = page
        first = start % P.tokens
        in_page, quad = first + offset, first // 4 + tl.arange(0, N // 4)
        key_page = page
    else:
        block = tl.load(table + token // P.tokens, mask=seen, other=0)
        page = cache + block.to(tl.int64) * cache_block
        quads = start // 4 + tl.arange(0, N // 4)
        quad_block = tl.load(table + quads // (P.tokens // 4), mask=quads * 4 < length, other=0)
        quad_page = cache + quad_block.to(tl.int64) * cache_block
        in_page, quad = token % P.tokens, quads % (P.tokens // 4)
    scores = _scores(query, page, in_page, seen, P) * scale
    if MASKED:
        visible = token[None, :] <= position[:, None]
        if window > 0:
            visible = visible & (token[None, :] > position[:, None] - window)
        scores = tl.where(visible, scores, float("-inf"))
    new = tl.maximum(maximum, tl.max(scores, 1))
    # A row that has seen nothing yet keeps 0 everywhere instead of exp2(-inf + inf).
    finite = tl.where(new == float("-inf"), 0.0, new)
    p = tl.exp2(scores - finite[:, None])
    alpha = tl.exp2(maximum - finite)
    sums = _values(p, sums, alpha[:, None], page, quad_page, in_page, quad, seen, P, M, N)
    return new, total * alpha + tl.sum(p, 1), sums


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
