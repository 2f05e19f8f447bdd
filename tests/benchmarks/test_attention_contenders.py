"""Contenders of the attention benchmark attend rightly over pages of their own."""

from __future__ import annotations

import pytest
import torch

from benchmarks.attention_contenders import (
    BLOCK_TOKENS,
    KV_HEADS,
    LARGEST_ERROR,
    NAMES,
    Batch,
    Case,
    block_tables,
    calls,
    contender,
    relative_error,
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("head_dim", "gqa"), [(64, 4), (128, 1)])
def test_step_is_attention_over_what_it_wrote(name: str, head_dim: int, gqa: int) -> None:
    assert relative_error(name, Case("prefill", 160, 2, head_dim, gqa)) < LARGEST_ERROR


@pytest.mark.parametrize(
    ("phase", "context", "batch", "new"),
    [("decode", 8192, 16, 1), ("prefill", 256, 1, 256), ("prefill", 8192, 1, 2048), ("prefill", 8192, 16, 128)],
)
def test_new_tokens_are_one_or_a_chunk(phase: str, context: int, batch: int, new: int) -> None:
    assert Case(phase, context, batch, 64, 4).new_tokens == new


def test_new_tokens_go_to_the_end_of_their_sequences() -> None:
    case = Case("decode", BLOCK_TOKENS + 2, 2, 64, 1)
    table = torch.tensor([[4, 1], [0, 3]], dtype=torch.int32)
    assert Batch(case).slots(table).tolist() == [BLOCK_TOKENS + 1, 3 * BLOCK_TOKENS + 1]


def test_copies_share_no_page() -> None:
    case = Case("decode", 300, 2, 64, 1)
    tables = block_tables(case, 5)
    pages = torch.cat([table.flatten() for table in tables])
    assert sorted(pages.tolist()) == list(range(5 * 2 * 3))
    assert {tuple(table.shape) for table in tables} == {(2, 3)}


@pytest.mark.parametrize("name", NAMES)
def test_every_copy_can_be_called(name: str) -> None:
    batch = Batch(Case("decode", 130, 2, 64, 4))
    chosen = contender(name, batch)
    assert [call() for call in calls(chosen, block_tables(batch.case, 3))] == [None] * 3


def test_bytes_of_a_token() -> None:
    batch = Batch(Case("decode", 128, 1, 64, 1))
    assert {name: contender(name, batch).bytes_per_token for name in NAMES} == {"resq": 84, "bf16": 256, "fp8": 128}
    assert contender("bf16", batch).empty_cache(3).nbytes == 3 * KV_HEADS * BLOCK_TOKENS * 256
