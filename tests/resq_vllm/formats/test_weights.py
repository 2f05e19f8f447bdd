"""Nibble packing of checkpoint weights."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from resq_vllm.formats.weights import pack_int4, unpack_int4


@given(rows=st.integers(0, 9), pairs=st.integers(0, 40), seed=st.integers(0, 2**31))
def test_round_trip(rows: int, pairs: int, seed: int) -> None:
    codes = torch.randint(-8, 8, (rows, 2 * pairs), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    packed = pack_int4(codes)
    assert packed.shape == (rows, pairs)
    assert torch.equal(unpack_int4(packed), codes)


def test_even_column_is_the_low_nibble() -> None:
    assert pack_int4(torch.tensor([[1, -1, -8, 7]], dtype=torch.int8)).tolist() == [[0xF1, 0x78]]
