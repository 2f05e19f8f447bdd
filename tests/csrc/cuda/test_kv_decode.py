"""The decode attention kernel's own source on the host: within twice the error of torch in bf16, as Triton's."""

from __future__ import annotations

import ctypes
from dataclasses import astuple, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.csrc.cuda.kv_support import decode, emulation
from tests.resq_vllm.gpu_kv.batches import Sequence, Shape, batch, errors

MARK = 77.0
HEAD_DIMS = [64, 96, 128]


def shape_of(head_dim: int, group: int, kv_heads: int = 1) -> Shape:
    return Shape(head_dim, head_dim // 8, 4, group, kv_heads, 64)


def hold(
    shape: Shape,
    sequences: list[Sequence],
    splits: int,
    window: int = -1,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> None:
    made = batch(shape, sequences, dtype, seed)
    output = decode(made, shape, splits, window, max(s.queries for s in sequences), MARK, seed)
    found, allowed = errors(made, shape, output, window)
    assert found <= 2 * allowed
    assert bool((output[int(made.query_start_loc[-1]) :] == MARK).all())


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_planes_of_a_page(head_dim: int) -> None:
    found = (ctypes.c_int64 * 7)()
    assert emulation().resq_kv_page(head_dim, found) == 0
    assert tuple(found) == astuple(shape_of(head_dim, 1).layout.planes(64))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("group", [1, 4, 8, 16])
def test_one_sequence(head_dim: int, group: int) -> None:
    hold(shape_of(head_dim, group), [Sequence(200, 1)], 1)


@pytest.mark.parametrize("splits", [1, 2, 3, 4, 9])
def test_splits(splits: int) -> None:
    hold(shape_of(128, 4, 2), [Sequence(500, 1), Sequence(1, 1), Sequence(64, 1), Sequence(65, 1)], splits)


@pytest.mark.parametrize("window", [1, 30, 64, 200])
@pytest.mark.parametrize("queries", [1, 3])
def test_window(window: int, queries: int) -> None:
    hold(shape_of(64, 4), [Sequence(300, queries), Sequence(10, 2)], 2, window)


def test_pages_before_the_window_may_hold_anything() -> None:
    shape, window = shape_of(64, 4), 20
    made = batch(shape, [Sequence(300, 1)], torch.bfloat16)
    made.cache[made.block_table[0, :4].long()] = 255
    clean = batch(shape, [Sequence(300, 1)], torch.bfloat16)
    outputs = [decode(one, shape, 1, window, 1, MARK, 0) for one in (made, clean)]
    assert torch.equal(*outputs)


def test_speculated_tokens_and_sequences_without_any() -> None:
    hold(shape_of(128, 4), [Sequence(130, 4), Sequence(70, 0), Sequence(2, 2), Sequence(300, 1)], 2)


@pytest.mark.parametrize("length", [64, 66, 130])
def test_a_speculated_token_sees_none_behind_it(length: int) -> None:
    """The first of four queries gives the bits that it gives without the others, across the end of a page, too."""
    shape = shape_of(128, 4)
    made = batch(shape, [Sequence(length, 4)], torch.bfloat16)
    alone = replace(made, seq_lens=made.seq_lens - 3, query_start_loc=torch.tensor([0, 1], dtype=torch.int32))
    both, one = (decode(each, shape, 1, -1, 4, MARK, 0) for each in (made, alone))
    assert torch.equal(both[0], one[0])


def test_float16() -> None:
    hold(shape_of(128, 4), [Sequence(190, 1), Sequence(70, 2)], 2, dtype=torch.float16)


def test_scores_that_grow_from_page_to_page() -> None:
    """Accumulators are rescaled: the query is four times as long, so that a page's largest score changes the sums."""
    shape = shape_of(128, 4)
    made = batch(shape, [Sequence(400, 1)], torch.bfloat16)
    made.query.mul_(4)
    found, allowed = errors(made, shape, decode(made, shape, 1, -1, 1, MARK, 0), -1)
    assert found <= 2 * allowed


@settings(max_examples=12, deadline=None)
@given(
    head_dim=st.sampled_from(HEAD_DIMS),
    group=st.sampled_from([1, 2, 3, 5, 7, 8]),
    kv_heads=st.integers(1, 2),
    lengths=st.lists(st.integers(1, 260), min_size=1, max_size=3),
    splits=st.integers(1, 5),
    window=st.sampled_from([-1, -1, 7, 100]),
    seed=st.integers(0, 1000),
)
def test_any_batch(
    head_dim: int, group: int, kv_heads: int, lengths: list[int], splits: int, window: int, seed: int
) -> None:
    most = 16 // group
    sequences = [Sequence(n, min(n, 1 + seed % most)) for n in lengths]
    hold(shape_of(head_dim, group, kv_heads), sequences, splits, window, seed=seed)
