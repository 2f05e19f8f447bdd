"""Bytes and planes of the packed KV page."""

from __future__ import annotations

import pytest

from resq_vllm.errors import ResQError
from resq_vllm.formats.kv_layout import KVLayout


@pytest.mark.parametrize(
    ("head_dim", "high", "low_bits", "size"),
    [
        (64, 8, 4, 84),
        (128, 16, 4, 156),
        (32, 4, 4, 52),
        (96, 12, 4, 124),
        (80, 10, 4, 108),
        (64, 0, 4, 70),
        (64, 8, 8, 140),
    ],
)
def test_bytes_per_token(head_dim: int, high: int, low_bits: int, size: int) -> None:
    layout = KVLayout(head_dim, high, low_bits)
    assert layout.bytes_per_token == size
    assert layout.planes(128).total == 128 * size


@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128])
def test_planes_are_aligned_for_vector_loads(head_dim: int) -> None:
    at = KVLayout(head_dim, head_dim // 8).planes(16)
    assert all(offset % 16 == 0 for offset in (at.key_high, at.value_low, at.value_high, at.scales, at.zeros))


def test_four_bits_hold_2_8_times_the_tokens_of_bf16() -> None:
    assert 4 * 64 / KVLayout(64, 8).bytes_per_token > 3.0
    assert 4 * 128 / KVLayout(128, 16).bytes_per_token > 3.2


def test_block_size_that_is_no_multiple_of_16_is_refused() -> None:
    with pytest.raises(ResQError, match="multiple of 16, not 24"):
        KVLayout(64, 8).planes(24)


@pytest.mark.parametrize(("high", "bits"), [(64, 4), (-1, 4), (8, 3)])
def test_impossible_layouts_are_refused(high: int, bits: int) -> None:
    with pytest.raises(ResQError):
        KVLayout(64, high, bits)
