"""How decode batches are cut over a GPU, and the workspace planned for them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from resq_vllm.gpu_kv.schedule import (
    CUDA_PROGRAMS_PER_SM,
    DECODE_ROWS,
    MAX_SPLITS,
    PROGRAMS_PER_SM,
    decode_splits,
    split_bytes,
    workspace_bytes,
)


@given(
    sequences=st.integers(1, 1024),
    more=st.integers(0, 512),
    kv_heads=st.sampled_from([1, 2, 4, 8, 16]),
    group=st.sampled_from([1, 4, 7, 8]),
    queries=st.integers(1, 4),
    head_dim=st.sampled_from([64, 96, 128, 256]),
    num_sms=st.integers(1, 160),
    length=st.integers(1, 200_000),
    programs=st.sampled_from([PROGRAMS_PER_SM, CUDA_PROGRAMS_PER_SM]),
)
def test_the_planned_workspace_holds_every_smaller_batch(
    sequences: int,
    more: int,
    kv_heads: int,
    group: int,
    queries: int,
    head_dim: int,
    num_sms: int,
    length: int,
    programs: int,
) -> None:
    splits = decode_splits(sequences, kv_heads, num_sms, length, programs)
    assert 1 <= splits <= MAX_SPLITS
    heads = kv_heads * group
    planned = workspace_bytes(sequences + more, heads, kv_heads, head_dim, num_sms, queries)
    if queries * group <= DECODE_ROWS:
        assert split_bytes(sequences, splits, heads, head_dim, queries) <= planned


def test_splits_of_an_h200() -> None:
    def splits(batch: int, length: int = 32768) -> int:
        return decode_splits(batch, 8, 132, length)

    batches = (1, 4, 16, 32, 64, 128, 133, 200, 256, 512, 1024)
    assert [splits(batch) for batch in batches] == [103, 57, 7, 7, 7, 3, 3, 1, 1, 1, 1]
    assert [splits(1, length) for length in (1, 64, 65, 4096)] == [1, 1, 2, 64]


def test_workspace_of_an_8b_model_is_small_and_zero_where_nothing_is_split() -> None:
    assert 0 < workspace_bytes(512, 32, 8, 128, 132) < 12 << 20
    assert workspace_bytes(512, 32, 8, 128, 132) == workspace_bytes(66, 32, 8, 128, 132)
    assert workspace_bytes(512, 32, 8, 128, 132, 4) == 4 * workspace_bytes(512, 32, 8, 128, 132)
    assert workspace_bytes(512, 32, 8, 128, 0) == 0
