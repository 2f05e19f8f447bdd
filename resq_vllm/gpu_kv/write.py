"""The cache write: rotate, quantize and pack new keys and values, and rotate the queries beside them, in one launch.

A program takes 16 (token, head) rows of the keys or of the values. A low byte's two nibbles are two products with
differently gathered columns of U_C (or two gathered loads), so nothing is exchanged between lanes. Per row and part:
one scale and zero point. A token's bytes are stored one plane after another; the L2 cache joins them to sectors.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from resq_vllm.gpu_kv.arithmetic import round_half_even
from resq_vllm.gpu_kv.checks import check_query, check_write
from resq_vllm.gpu_kv.page import Page, key_byte, page_of, value_byte
from resq_vllm.gpu_kv.rotation import rotate_query, rotate_query_rows, rotate_rows

_ROWS = 16
# Query rows up to which a batch's queries turn in the launch of the write: with so few, a launch is what counts. More
# take a launch of their own, 64 rows a program: U_C is read and split into terms a quarter as often.
FUSED_QUERY_ROWS = 4096
_FLOAT16_MAX: tl.constexpr = tl.constexpr(65504.0)


@triton.jit
def _columns(
    rows,
    valid,
    rotation,
    dims,
    dim_valid,
    P: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    ROTATE: tl.constexpr,
):
    """float32 [M, N]: dims ``dims`` of the (rotated) rows, 0 where dim_valid is false."""
    if ROTATE:
        x = rotate_rows(rows, valid, rotation, dims, dim_valid, M, N, P.head_dim, 16 if P.head_dim % 32 else 32, 3)
    else:
        x = tl.load(rows + dims, mask=valid & dim_valid, other=0.0).to(tl.float32)
    return x


@triton.jit
def _scale_zero(low, high, BITS: tl.constexpr):
    """Of rows whose values span [low, high], widened to include 0: float16 scale as float32, zero point (both [M])."""
    low, high = tl.minimum(low, 0.0), tl.maximum(high, 0.0)
    levels = (1 << BITS) - 1
    scale = tl.math.div_rn(high - low, tl.full(low.shape, levels, tl.float32))
    scale = tl.minimum(scale, _FLOAT16_MAX).to(tl.float16).to(tl.float32)
    scale = tl.where(scale == 0.0, 1.0, scale)
    zero = round_half_even(tl.math.div_rn(-low, scale))
    return scale, tl.minimum(tl.maximum(zero, 0.0), levels)


@triton.jit
def _codes(x, scale, zero, BITS: tl.constexpr):
    scaled = round_half_even(tl.math.div_rn(x, scale[:, None] + tl.zeros_like(x))) + zero[:, None]
    return tl.minimum(tl.maximum(scaled, 0.0), (1 << BITS) - 1).to(tl.int32)


@triton.jit
def _store_scale(page, valid, token, scale, zero, part, P: tl.constexpr):
    """part: row of the scale planes: keys' low, high, values' low, high."""
    at = (page + P.scales).to(tl.pointer_type(tl.float16))
    tl.store(at + part * P.tokens + token, scale.to(tl.float16), mask=valid)
    tl.store(page + P.zeros + part * P.tokens + token, zero.to(tl.uint8), mask=valid)


@triton.jit
def _pack(
    rows,  # [M, 1] pointers to the first element
    valid,  # [M]
    page,  # [M] pointers to the page
    token,  # [M] token in the page
    rotation,
    P: tl.constexpr,
    M: tl.constexpr,
    IS_KEY: tl.constexpr,
    ROTATE: tl.constexpr,
):
    has = valid[:, None]
    at = token[:, None]
    part: tl.constexpr = 0 if IS_KEY else P.parts
    byte = tl.arange(0, P.lanes)[None, :]
    if IS_KEY:
        low_page = page
        place = key_byte(at, byte, P.low_width)
    else:
        low_page = page + P.value_low
        place = value_byte(at, byte, P.low_width)
    if P.low_bits == 4:
        if IS_KEY:
            even = (byte // 4) * 8 + byte % 4
            odd = even + 4
        else:
            even = byte
            odd = byte + P.low_width
        even_valid, odd_valid = (byte < P.low_width) & (even < P.low), (byte < P.low_width) & (odd < P.low)
        x = _columns(rows, has, rotation, even, even_valid, P, M, P.lanes, ROTATE)
        y = _columns(rows, has, rotation, odd, odd_valid, P, M, P.lanes, ROTATE)
        # Columns that are not there are 0, which the range includes anyway.
        least = tl.minimum(tl.min(x, 1), tl.min(y, 1))
        most = tl.maximum(tl.max(x, 1), tl.max(y, 1))
        scale, zero = _scale_zero(least, most, 4)
        x_codes = tl.where(even_valid, _codes(x, scale, zero, 4), 0)
        y_codes = tl.where(odd_valid, _codes(y, scale, zero, 4), 0)
        packed = x_codes | (y_codes << 4)
    else:
        dim_valid = byte < P.low
        x = _columns(rows, has, rotation, byte, dim_valid, P, M, P.lanes, ROTATE)
        scale, zero = _scale_zero(tl.min(x, 1), tl.max(x, 1), 8)
        packed = tl.where(dim_valid, _codes(x, scale, zero, 8), 0)
    tl.store(low_page[:, None] + place, packed.to(tl.uint8), mask=has & (byte < P.low_width))
    _store_scale(page, valid, token, scale, zero, part, P)
    if P.high > 0:
        dim = tl.arange(0, P.high_dims)[None, :]
        x = _columns(rows, has, rotation, P.low + dim, dim < P.high, P, M, P.high_dims, ROTATE)
        scale, zero = _scale_zero(tl.min(x, 1), tl.max(x, 1), 8)
        codes = tl.where(dim < P.high, _codes(x, scale, zero, 8), 0).to(tl.uint8)
        if IS_KEY:
            high_place = page[:, None] + P.key_high + key_byte(at, dim, P.high_width)
        else:
            high_place = page[:, None] + P.value_high + value_byte(at, dim, P.high_width)
        tl.store(high_place, codes, mask=has & (dim < P.high_width))
        _store_scale(page, valid, token, scale, zero, part + 1, P)


@triton.jit(
    do_not_specialize=["tokens", "sequences"], do_not_specialize_on_alignment=["slot_mapping", "query_start_loc"]
)
def _write(
    query,
    output,
    query_start_loc,
    sequences,
    query_heads,
    query_token,
    query_head,
    output_token,
    output_head,
    key,
    value,
    cache,
    slot_mapping,
    rotation,
    tokens,
    heads,
    key_token,
    key_head,
    value_token,
    value_head,
    cache_block,
    cache_head,
    P: tl.constexpr,
    M: tl.constexpr,
    ROTATE: tl.constexpr,
    QUERIES: tl.constexpr,
):
    what = tl.program_id(1)  # 0: keys, 1: values, others: queries
    if what < 2:
        row = tl.program_id(0) * M + tl.arange(0, M)
        t, head = row // heads, row % heads
        slot = tl.load(slot_mapping + t, mask=t < tokens, other=-1)
        valid = slot >= 0
        slot = tl.where(valid, slot, 0)
        page = cache + (slot // P.tokens) * cache_block + head.to(tl.int64) * cache_head
        token = (slot % P.tokens).to(tl.int32)
        t = t.to(tl.int64)
        if what == 0:
            rows = key + (t * key_token + head * key_head)[:, None]
            _pack(rows, valid, page, token, rotation, P, M, True, ROTATE)
        else:
            rows = value + (t * value_token + head * value_head)[:, None]
            _pack(rows, valid, page, token, rotation, P, M, False, False)
    elif QUERIES:
        rotate_query_rows(
            (what - 2) * tl.num_programs(0) + tl.program_id(0),
            query,
            output,
            rotation,
            query_start_loc,
            sequences,
            query_heads,
            query_token,
            query_head,
            output_token,
            output_head,
            P.head_dim,
            P.dims,
            M,
        )


def kv_write(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    rotation: torch.Tensor | None,
    high: int,
    low_bits: int,
) -> None:
    """Rotate key by U_C, quantize key and value and pack them into their pages, in place (reference.kv_write).

    key, value bf16, float16 or float32 [>= T, Hkv, hd], last dim contiguous (views into a fused qkv are fine); cache
    uint8 [blocks, Hkv, N, C] with contiguous pages; slot_mapping int64 [T] = block·N + offset, negative = skip;
    rotation float32 [hd, hd], contiguous, or None. Values' codes are the reference's; a key's can differ by one where
    a float32 sum in another order falls on the other side of a rounding boundary. Raises ResQError on bad arguments.
    """
    heads, head_dim = key.shape[1], key.shape[2]
    page = page_of(head_dim, high, low_bits, cache.shape[2])
    check_write(key, value, cache, slot_mapping, rotation, page)
    tokens = slot_mapping.shape[0]
    if tokens:
        _launch(None, key, value, cache, slot_mapping, rotation, tokens, heads, page)


def write_and_rotate(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    output: torch.Tensor,
    slot_mapping: torch.Tensor,
    query_start_loc: torch.Tensor,
    rotation: torch.Tensor,
    high: int,
    low_bits: int,
) -> None:
    """:func:`kv_write`, and output = query·U_C in the rows that query_start_loc covers: what attention reads then.

    query, output [>= T, H, hd] of key's dtype, not overlapping, last dim contiguous; query_start_loc int32 [S+1]. One
    launch for up to FUSED_QUERY_ROWS query rows, two beyond. Raises ResQError on bad arguments.
    """
    page = page_of(key.shape[2], high, low_bits, cache.shape[2])
    check_write(key, value, cache, slot_mapping, rotation, page)
    check_query(query, output, key, query_start_loc)
    tokens, rows = slot_mapping.shape[0], query.shape[0] * query.shape[1]
    together = tokens > 0 and rows <= FUSED_QUERY_ROWS
    if tokens:
        turned = (query, output, query_start_loc) if together else None
        _launch(turned, key, value, cache, slot_mapping, rotation, tokens, key.shape[1], page)
    if rows and not together:
        rotate_query(query, output, query_start_loc, rotation)


def _launch(
    turned: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    rotation: torch.Tensor | None,
    tokens: int,
    heads: int,
    page: Page,
) -> None:
    """turned: query, output and query_start_loc, where the queries turn in this launch."""
    programs = triton.cdiv(tokens * heads, _ROWS)
    # Without queries no program touches them.
    query, output, starts = turned or (key, key, slot_mapping)
    of_query = triton.cdiv(query.shape[0] * query.shape[1], _ROWS * programs) if turned else 0
    _write[(programs, 2 + of_query)](
        query,
        output,
        starts,
        starts.shape[0] - 1,
        query.shape[1],
        query.stride(0),
        query.stride(1),
        output.stride(0),
        output.stride(1),
        key,
        value,
        cache,
        slot_mapping,
        rotation,
        tokens,
        heads,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        cache.stride(0),
        cache.stride(1),
        P=page,
        M=_ROWS,
        ROTATE=rotation is not None,
        QUERIES=turned is not None,
        num_warps=4,
        enable_fp_fusion=True,  # Triton 3.10 no longer does so by itself
    )
