"""kv_write against the reference: the same bytes without a rotation, the same codes but for float32 ties with one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resq_vllm import ops, reference
from resq_vllm.formats.kv_layout import KVLayout
from tests.csrc.support import ISAS, generator, running

LAYOUTS = [
    KVLayout(32, 4),
    KVLayout(64, 8),
    KVLayout(80, 10),
    KVLayout(96, 12),
    KVLayout(128, 16),
    KVLayout(64, 0),
    KVLayout(64, 8, 8),
    KVLayout(18, 5),
    KVLayout(13, 0, 8),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _rotation(dim: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(dim, dim, generator=generator(seed)))[0].contiguous()


def _cache(layout: KVLayout, blocks: int, heads: int, tokens: int, seed: int) -> torch.Tensor:
    shape = (blocks, heads, tokens, layout.bytes_per_token)
    return torch.randint(0, 256, shape, generator=generator(seed)).to(torch.uint8)


@settings(max_examples=40, deadline=None)
@given(
    layout=st.sampled_from(LAYOUTS),
    block_size=st.sampled_from([16, 32, 48, 128]),
    tokens=st.integers(1, 40),
    heads=st.integers(1, 5),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_bytes_equal_reference(
    layout: KVLayout, block_size: int, tokens: int, heads: int, dtype: torch.dtype, seed: int
) -> None:
    g = generator(seed)
    magnitude = torch.logspace(-6, 4, tokens)[torch.randperm(tokens, generator=g)][:, None, None]
    # K and V as slices of one fused projection: strided by token.
    fused = (torch.randn(tokens, 2 * heads, layout.head_dim, generator=g) * magnitude).to(dtype)
    key, value = fused[:, :heads], fused[:, heads:]
    blocks = tokens // block_size + 2
    slots = torch.randperm(blocks * block_size, generator=g)[:tokens]
    slots[torch.rand(tokens, generator=g) < 0.1] = -1
    before = _cache(layout, blocks, heads, block_size, seed)
    expected = before.clone()
    reference.kv_write(key, value, expected, slots, None, layout)
    for isa in ISAS:
        cache = before.clone()
        with running(isa):
            ops.kv_write(key, value, cache, slots, None, layout.high, layout.low_bits)
        assert torch.equal(cache, expected), isa


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 2])
def test_whole_tiles_between_single_tokens_equal_reference(layout: KVLayout, dtype: torch.dtype, threads: int) -> None:
    """A prompt's slots in order: some tiles of 16 tokens are written as a whole, the tokens around them are not."""
    tokens, heads, block_size = 85, 3, 48
    g = generator(layout.head_dim)
    fused = torch.randn(tokens, 2 * heads, layout.head_dim, generator=g)
    # Every third token has values halfway between codes, where a product with 1/scale could round the other way.
    fused[::3] = torch.randint(-30, 31, fused[::3].shape, generator=g) / 2
    fused[5::16] *= 1e6
    fused = fused.to(dtype)
    key, value = fused[:, :heads], fused[:, heads:]
    # Three blocks in some order, from the seventh slot of the first one on; a hole in the middle of a tile.
    slots = (torch.tensor([3, 0, 2])[:, None] * block_size + torch.arange(block_size)).flatten()[7 : 7 + tokens]
    slots[60] = -1
    before = _cache(layout, 4, heads, block_size, 2)
    expected = before.clone()
    reference.kv_write(key, value, expected, slots, None, layout)
    found = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for isa in ISAS:
            cache = before.clone()
            with running(isa):
                ops.kv_write(key, value, cache, slots, None, layout.high, layout.low_bits)
            assert torch.equal(cache, expected), isa
            # One by one, no tile is whole.
            alone = before.clone()
            with running(isa):
                for t in range(tokens):
                    one = slice(t, t + 1)
                    ops.kv_write(key[one], value[one], alone, slots[one], None, layout.high, layout.low_bits)
            assert torch.equal(cache, alone), isa
    finally:
        torch.set_num_threads(found)


@pytest.mark.parametrize("layout", [KVLayout(64, 8), KVLayout(128, 16), KVLayout(80, 10), KVLayout(13, 0, 8)])
def test_rotated_tiles_equal_single_tokens_but_for_ties(layout: KVLayout) -> None:
    """A rotation by bfloat16 tiles has float32's 24 bits: another order of sums, and no other difference."""
    tokens, heads = 128, 3
    g = generator(layout.head_dim + 1)
    key, value = (torch.randn(tokens, heads, layout.head_dim, generator=g).bfloat16() for _ in range(2))
    rotation, slots = _rotation(layout.head_dim, 3), torch.arange(tokens)
    for isa in ISAS:
        tiles, alone = (torch.zeros(8, heads, 16, layout.bytes_per_token, dtype=torch.uint8) for _ in range(2))
        with running(isa):
            ops.kv_write(key, value, tiles, slots, rotation, layout.high, layout.low_bits)
            for t in range(tokens):
                one = slice(t, t + 1)
                ops.kv_write(key[one], value[one], alone, slots[one], rotation, layout.high, layout.low_bits)
        assert (tiles != alone).float().mean() < 1e-4, isa


@pytest.mark.parametrize("layout", [KVLayout(64, 8), KVLayout(128, 16), KVLayout(80, 10)])
def test_rotation_moves_a_code_by_at_most_one(layout: KVLayout) -> None:
    tokens, heads = 64, 3
    g = generator(layout.head_dim)
    key, value = (torch.randn(tokens, heads, layout.head_dim, generator=g).bfloat16() for _ in range(2))
    rotation = _rotation(layout.head_dim, 1)
    expected = torch.zeros(4, heads, 16, layout.bytes_per_token, dtype=torch.uint8)
    slots = torch.arange(tokens)
    reference.kv_write(key, value, expected, slots, rotation, layout)
    table = torch.arange(4)
    keys, values = reference.kv_read(expected, table, tokens, layout)
    _, scales, _ = reference.kv_quantize(key.float() @ rotation, layout)
    step = scales.float().repeat_interleave(torch.tensor([layout.low, layout.high]), dim=-1)
    for isa in ISAS:
        cache = torch.zeros_like(expected)
        with running(isa):
            ops.kv_write(key, value, cache, slots, rotation, layout.high, layout.low_bits)
        our_keys, our_values = reference.kv_read(cache, table, tokens, layout)
        assert torch.equal(our_values, values), isa
        moved = (our_keys - keys).abs() / step
        # A scale that rounds to the neighbouring float16 moves values by up to 255·2^-10 of a step without any code.
        assert (moved < 1.26).all(), isa
        assert (moved > 0.5).float().mean() < 0.01, isa
        error, torch_error = ((k.double() - key.double() @ rotation.double()).abs().mean() for k in (our_keys, keys))
        assert error < torch_error * 1.001, isa


@pytest.mark.parametrize("isa", ISAS)
def test_strided_blocks(isa: str) -> None:
    """Blocks of one layer inside a larger allocation, heads apart: only pages are contiguous."""
    layout = KVLayout(64, 8)
    whole = torch.zeros(5, 3, 4, 16, layout.bytes_per_token, dtype=torch.uint8)
    cache = whole[:, 1, ::2]
    key, value = torch.randn(20, 2, 64), torch.randn(20, 2, 64)
    expected = torch.zeros(5, 2, 16, layout.bytes_per_token, dtype=torch.uint8)
    slots = torch.arange(20) + 21
    reference.kv_write(key, value, expected, slots, None, layout)
    with running(isa):
        ops.kv_write(key, value, cache, slots, None, 8, 4)
    assert torch.equal(cache, expected)
    whole[:, 1, ::2] = 0
    assert not whole.any()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("value", [0.0, 5.0, -5.0, 1e-9, 1e30, -1e30])
def test_constant_heads(isa: str, value: float) -> None:
    layout = KVLayout(64, 8)
    x = torch.full((1, 1, 64), value)
    expected = torch.zeros(1, 1, 16, layout.bytes_per_token, dtype=torch.uint8)
    cache = expected.clone()
    reference.kv_write(x, -x, expected, torch.tensor([3]), None, layout)
    with running(isa):
        ops.kv_write(x, -x, cache, torch.tensor([3]), None, 8, 4)
    assert torch.equal(cache, expected)


def test_slots_of_minus_one_and_missing_slots_write_nothing() -> None:
    cache = torch.zeros(1, 2, 16, KVLayout(64, 8).bytes_per_token, dtype=torch.uint8)
    key, value = torch.randn(3, 2, 64), torch.randn(3, 2, 64)
    ops.kv_write(key, value, cache, torch.tensor([-1, -1]), None, 8, 4)
    ops.kv_write(key[:0], value[:0], cache, torch.empty(0, dtype=torch.int64), None, 8, 4)
    assert not cache.any()


def test_bad_arguments_are_named_before_anything_is_written() -> None:
    cache = torch.zeros(2, 2, 16, KVLayout(64, 8).bytes_per_token, dtype=torch.uint8)
    x, slots = torch.randn(1, 2, 64), torch.tensor([0])
    for message, call in {
        "slot_mapping names slot 32, but the cache has only 32": lambda: ops.kv_write(
            x.expand(2, 2, 64), x.expand(2, 2, 64), cache, torch.tensor([0, 32]), None, 8, 4
        ),
        "kv_cache has 84 bytes a token and head, but head_dim 64 with 16": lambda: ops.kv_write(
            x, x, cache, slots, None, 16, 4
        ),
        "multiple of 16, not 8": lambda: ops.kv_write(x, x, cache[:, :, :8], slots, None, 8, 4),
        "kv_cache must have contiguous pages": lambda: ops.kv_write(
            x, x, cache.transpose(1, 2).contiguous().transpose(1, 2), slots, None, 8, 4
        ),
        r"rotation must have shape \[64, 64\]": lambda: ops.kv_write(x, x, cache, slots, torch.eye(32), 8, 4),
        "slot_mapping must be int64": lambda: ops.kv_write(x, x, cache, slots.int(), None, 8, 4),
        "value must have key's dtype": lambda: ops.kv_write(x, x.half(), cache, slots, None, 8, 4),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            call()
    assert not cache.any()
