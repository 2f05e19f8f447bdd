"""kv_write by Triton's interpreter or on a GPU (run by test_kernels.py): the reference's bytes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resq_vllm import reference
from resq_vllm.errors import ResQError
from resq_vllm.gpu_kv import kv_write, write, write_and_rotate
from tests.resq_vllm.gpu_kv.batches import DEVICE, Shape, fused, rotation

TOKENS = 6


def written_there(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    slots: torch.Tensor,
    turn: torch.Tensor | None,
    high: int,
    low_bits: int,
) -> torch.Tensor:
    """The cache after kv_write on DEVICE."""
    there = cache.to(DEVICE)
    # A strided view stays one: both lie in the same storage here as there.
    qkv = torch.cat((key, value), 1).to(DEVICE)
    moved = None if turn is None else turn.to(DEVICE)
    heads = key.shape[1]
    kv_write(qkv[:, :heads], qkv[:, heads:], there, slots.to(DEVICE), moved, high, low_bits)
    return there.cpu()


def written(shape: Shape, slots: list[int], dtype: torch.dtype, turned: bool, seed: int = 0) -> list[torch.Tensor]:
    """The cache as the kernel and as the reference leave it."""
    g = torch.Generator().manual_seed(seed)
    _, key, value = fused(TOKENS, shape, dtype, g)
    turn = rotation(shape.head_dim, g) if turned else None
    blocks = torch.full((3, shape.kv_heads, shape.block, shape.layout.bytes_per_token), 0xA5, dtype=torch.uint8)
    found, expected = blocks.clone(), blocks.clone()
    slot_mapping = torch.tensor(slots)
    found = written_there(key, value, found, slot_mapping, turn, shape.high, shape.low_bits)
    reference.kv_write(key, value, expected, slot_mapping, turn, shape.layout)
    return [found, expected]


def dequantized(shape: Shape, cache: torch.Tensor) -> torch.Tensor:
    """K̂ and V̂ of all pages, float32 [2, blocks, heads, N, head_dim]."""
    pages = [[reference.kv_read_page(page, shape.layout) for page in block] for block in cache]
    return torch.stack([torch.stack([torch.stack(heads) for heads in zip(*block, strict=True)]) for block in pages], 1)


@given(
    head_dim=st.sampled_from([64, 96, 128]),
    eighths=st.sampled_from([0, 1, 2]),
    low_bits=st.sampled_from([4, 8]),
    block=st.sampled_from([16, 32, 64]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    order=st.permutations(range(40)),
)
@settings(max_examples=12)
def test_without_a_rotation_every_byte_is_the_references(
    head_dim: int, eighths: int, low_bits: int, block: int, dtype: torch.dtype, order: list[int]
) -> None:
    shape = Shape(head_dim, head_dim * eighths // 8, low_bits, 1, 2, block)
    slots = [slot if slot % 5 else -1 for slot in order[:TOKENS]]
    found, expected = written(shape, slots, dtype, turned=False, seed=order[0])
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "shape",
    [Shape(64, 8, 4, 4, 3, 16), Shape(128, 16, 4, 1, 2, 64), Shape(96, 12, 8, 2, 2, 32), Shape(128, 0, 4, 1, 2, 16)],
    ids=str,
)
def test_rotated_keys_differ_only_where_a_float32_sum_crosses_a_rounding_boundary(
    shape: Shape, dtype: torch.dtype
) -> None:
    found, expected = written(shape, [5, -1, 40, 17, 0, 1], dtype, turned=True)
    keys, values = (dequantized(shape, found) - dequantized(shape, expected)).nan_to_num()
    assert not values.any()
    # One step of a part's scale, here at most 8/15 (4 bit): never two, and in few places.
    assert int((found != expected).sum()) <= 2
    assert float(keys.abs().max()) < 1.0


def test_a_head_of_256_dims() -> None:
    found, expected = written(Shape(256, 32, 4, 1, 1, 16), [3, 9, 12, -1, 4, 30], torch.bfloat16, turned=True)
    assert int((found != expected).sum()) <= 2


@pytest.mark.parametrize("fused_rows", [4096, 0], ids=["one launch", "two launches"])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        (Shape(64, 8, 4, 4, 3, 16), torch.bfloat16),
        (Shape(128, 16, 4, 8, 1, 64), torch.bfloat16),
        (Shape(96, 12, 8, 1, 2, 32), torch.float16),
        (Shape(64, 0, 4, 7, 1, 16), torch.float32),
    ],
    ids=str,
)
def test_queries_turn_beside_the_write(
    shape: Shape, dtype: torch.dtype, fused_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries outnumber the written tokens, and some rows before and behind the sequences are not theirs."""
    monkeypatch.setattr(write, "FUSED_QUERY_ROWS", fused_rows)
    g = torch.Generator().manual_seed(4)
    query, key, value = fused(TOKENS + 9, shape, dtype, g)
    turn = rotation(shape.head_dim, g)
    slots, starts = torch.tensor([5, -1, 40, 17, 0, 1]), torch.tensor([2, 3, 3, TOKENS + 5], dtype=torch.int32)
    cache = torch.full((3, shape.kv_heads, shape.block, shape.layout.bytes_per_token), 0xA5, dtype=torch.uint8)
    alone = written_there(key, value, cache.clone(), slots, turn, shape.high, shape.low_bits)
    there, output = cache.to(DEVICE), torch.full_like(query, 77.0, memory_format=torch.contiguous_format, device=DEVICE)
    q, k, v = (x.to(DEVICE) for x in (query, key, value))
    where = slots.to(DEVICE), starts.to(DEVICE)
    write_and_rotate(q, k, v, there, output, *where, turn.to(DEVICE), shape.high, shape.low_bits)
    assert torch.equal(there.cpu(), alone)
    found, covered = output.cpu(), slice(2, TOKENS + 5)
    exact = query.double() @ turn.double()
    allowed = (query.float() @ turn).to(dtype).double() - exact
    assert float((found.double() - exact)[covered].abs().max()) <= 2 * float(allowed[covered].abs().max())
    assert bool((found[:2] == 77.0).all())
    assert bool((found[TOKENS + 5 :] == 77.0).all())


def test_queries_turn_where_no_token_is_written() -> None:
    shape = Shape(64, 8, 4, 4, 1, 16)
    g = torch.Generator().manual_seed(4)
    query, key, value = (x.to(DEVICE) for x in fused(3, shape, torch.float32, g))
    turn, cache = rotation(64, g), torch.zeros(1, 1, 16, shape.layout.bytes_per_token, dtype=torch.uint8, device=DEVICE)
    output, none = torch.zeros_like(query, memory_format=torch.contiguous_format), torch.zeros(0, dtype=torch.int64)
    starts = torch.tensor([0, 3], dtype=torch.int32, device=DEVICE)
    write_and_rotate(query, key, value, cache, output, none.to(DEVICE), starts, turn.to(DEVICE), 8, 4)
    assert not cache.any()
    torch.testing.assert_close(output.cpu(), query.cpu() @ turn, rtol=1e-4, atol=1e-4)


def test_zeros_get_scale_one_and_a_large_value_saturates() -> None:
    shape = Shape(64, 8, 4, 1, 1, 16)
    key = torch.zeros(2, 1, 64)
    key[1, 0, 3], key[1, 0, 60] = 3e7, -3e7
    found, expected = torch.zeros(2, 1, 1, 16, shape.layout.bytes_per_token, dtype=torch.uint8)
    found = written_there(key, -key, found, torch.tensor([2, 7]), None, 8, 4)
    reference.kv_write(key, -key, expected, torch.tensor([2, 7]), None, shape.layout)
    assert torch.equal(found, expected)


def test_pages_of_a_strided_cache() -> None:
    shape = Shape(64, 8, 4, 1, 2, 16)
    _, key, value = fused(2, shape, torch.float32, torch.Generator().manual_seed(1))
    layers = torch.zeros(4, 2, 3, 16, shape.layout.bytes_per_token, dtype=torch.uint8)  # [blocks, heads, layers, …]
    expected = torch.zeros(4, 2, 16, shape.layout.bytes_per_token, dtype=torch.uint8)
    layers = layers.to(DEVICE)
    kv_write(key.to(DEVICE), value.to(DEVICE), layers[:, :, 1], torch.tensor([50, 3], device=DEVICE), None, 8, 4)
    layers = layers.cpu()
    reference.kv_write(key, value, expected, torch.tensor([50, 3]), None, shape.layout)
    assert torch.equal(layers[:, :, 1], expected)
    assert not layers[:, :, 0].any()
    assert not layers[:, :, 2].any()


def test_refusals() -> None:
    key = torch.zeros(4, 1, 64)
    cache = torch.zeros(2, 1, 16, 84, dtype=torch.uint8)
    slots = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ResQError, match=r"contiguous rows of 84 bytes, not of 80"):
        kv_write(key, key, cache[..., :80], slots, None, 8, 4)
    with pytest.raises(ResQError, match=r"slot_mapping must be int64 with at most 4 entries"):
        kv_write(key, key, cache, slots.int(), None, 8, 4)
    with pytest.raises(ResQError, match=r"float32 \[64, 64\]"):
        kv_write(key, key, cache, slots, torch.zeros(32, 32), 8, 4)
    with pytest.raises(ResQError, match=r"uint8 \[blocks, 1, N, C\]"):
        kv_write(key, key, cache.int(), slots, None, 8, 4)
    starts = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ResQError, match=r"64 dims a head like the keys, not torch.float16"):
        write_and_rotate(key.half(), key, key, cache, key.half(), slots, starts, torch.eye(64), 8, 4)
    with pytest.raises(ResQError, match=r"query and output must be alike"):
        write_and_rotate(key, key, key, cache, key[:2], slots, starts, torch.eye(64), 8, 4)
    with pytest.raises(ResQError, match=r"query_start_loc must be int32 \[2\]"):
        write_and_rotate(key, key, key, cache, key, slots, starts.long(), torch.eye(64), 8, 4)
    with pytest.raises(ResQError, match=r"multiple of 16, not 8"):
        kv_write(key, key, cache[:, :, :8], slots, None, 8, 4)
