"""attention by the interpreter or on a GPU (run by test_kernels.py): within twice the error of torch in bf16."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resq_vllm.errors import ResQError
from resq_vllm.formats.kv_layout import KVLayout
from resq_vllm.gpu_kv import attention, warm_up, workspace_bytes
from tests.resq_vllm.gpu_kv.batches import DEVICE, SMS, Batch, Sequence, Shape, batch, errors

MARK = 77.0


def attended(made: Batch, shape: Shape, window: int, longest: int, sms: int = SMS) -> torch.Tensor:
    heads, sequences = shape.heads, made.seq_lens.shape[0]
    size = workspace_bytes(sequences, heads, shape.kv_heads, shape.head_dim, sms, longest)
    # NaN: whatever a program reads of the workspace, another must have written.
    workspace = torch.full((size // 4,), float("nan"), device=DEVICE).view(torch.uint8) if size else None
    output = torch.full_like(made.query, MARK, memory_format=torch.contiguous_format, device=DEVICE)
    attention(
        made.query.to(DEVICE),
        made.cache.to(DEVICE),
        output,
        made.block_table.to(DEVICE),
        made.seq_lens.to(DEVICE),
        made.query_start_loc.to(DEVICE),
        made.rotation.to(DEVICE),
        shape.head_dim**-0.5,
        shape.high,
        shape.low_bits,
        window,
        longest,
        int(made.seq_lens.max()),
        workspace,
        num_sms=sms,
    )
    return output.cpu()


def hold(shape: Shape, sequences: list[Sequence], window: int = -1, dtype: torch.dtype = torch.bfloat16) -> None:
    made = batch(shape, sequences, dtype)
    output = attended(made, shape, window, max(s.queries for s in sequences))
    found, allowed = errors(made, shape, output, window)
    assert found <= 2 * allowed
    assert bool((output[int(made.query_start_loc[-1]) :] == MARK).all())


DECODES = {
    "head 64, splits": (Shape(64, 8, 4, 4, 1, 16), [Sequence(600, 1), Sequence(37, 1)]),
    "head 64, pages of 64": (Shape(64, 8, 4, 4, 2, 64), [Sequence(64, 1), Sequence(65, 1)]),
    "head 128, 8 queries a head": (Shape(128, 16, 4, 8, 1, 32), [Sequence(300, 1)]),
    "head 128, pages of 128": (Shape(128, 16, 4, 4, 1, 128), [Sequence(530, 1)]),
    "head 96": (Shape(96, 12, 4, 1, 2, 16), [Sequence(70, 1)]),
    "head 256": (Shape(256, 32, 4, 2, 1, 16), [Sequence(40, 1)]),
    "7 queries a head": (Shape(64, 8, 4, 7, 1, 16), [Sequence(20, 1), Sequence(1, 1)]),
    "no high part": (Shape(64, 0, 4, 4, 1, 16), [Sequence(300, 1)]),
    "8 bits": (Shape(64, 8, 8, 4, 1, 16), [Sequence(70, 1)]),
    "8 bits, no high part": (Shape(128, 0, 8, 2, 1, 16), [Sequence(70, 1)]),
    "speculative": (Shape(64, 8, 4, 4, 1, 16), [Sequence(300, 3), Sequence(9, 2), Sequence(40, 1)]),
    "padding sequences": (Shape(64, 8, 4, 4, 1, 16), [Sequence(33, 1), Sequence(0, 0), Sequence(5, 0)]),
}
PREFILLS = {
    "prompt": (Shape(64, 8, 4, 4, 1, 16), [Sequence(70, 70)]),
    "head 128": (Shape(128, 16, 4, 4, 1, 64), [Sequence(66, 33)]),
    "mixed": (Shape(64, 8, 4, 4, 1, 16), [Sequence(90, 1), Sequence(40, 40), Sequence(1, 1), Sequence(75, 20)]),
    "one query a head": (Shape(96, 12, 4, 1, 2, 32), [Sequence(30, 30), Sequence(50, 17)]),
    "7 queries a head, 8 bits": (Shape(64, 8, 8, 7, 1, 16), [Sequence(30, 30)]),
    "no high part": (Shape(64, 0, 4, 8, 1, 16), [Sequence(25, 25)]),
}


@pytest.mark.parametrize("name", DECODES)
def test_decode(name: str) -> None:
    hold(*DECODES[name])


@pytest.mark.parametrize("name", PREFILLS)
def test_prefill(name: str) -> None:
    hold(*PREFILLS[name])


@pytest.mark.parametrize("window", [1, 30, 64, 200])
def test_window(window: int) -> None:
    shape = Shape(64, 8, 4, 4, 1, 16)
    hold(shape, [Sequence(150, 1), Sequence(40, 1)], window)
    hold(shape, [Sequence(150, 40), Sequence(20, 20)], window)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_dtypes(dtype: torch.dtype) -> None:
    shape = Shape(64, 8, 4, 4, 1, 16)
    hold(shape, [Sequence(40, 1)], dtype=dtype)
    hold(shape, [Sequence(40, 20)], dtype=dtype)


sequence = st.builds(lambda past, queries: Sequence(past + queries, queries), st.integers(0, 90), st.integers(1, 24))


@given(
    head_dim=st.sampled_from([64, 96, 128]),
    eighths=st.sampled_from([0, 1]),
    low_bits=st.sampled_from([4, 4, 8]),
    group=st.sampled_from([1, 4, 8]),
    block=st.sampled_from([16, 32, 64]),
    sequences=st.lists(sequence, min_size=1, max_size=3),
    window=st.sampled_from([-1, -1, 25]),
)
@settings(max_examples=6)
def test_any_batch(
    head_dim: int,
    eighths: int,
    low_bits: int,
    group: int,
    block: int,
    sequences: list[Sequence],
    window: int,
) -> None:
    hold(Shape(head_dim, head_dim * eighths // 8, low_bits, group, 1, block), sequences, window)


@pytest.mark.parametrize("decodes", [1, 16, 40])
def test_a_batchs_prefills_alone_give_the_rows_of_the_whole(decodes: int) -> None:
    """Rows of the decodes before them are left alone, be they more than a block of queries (16 here)."""
    shape = Shape(64, 8, 4, 8, 1, 16)
    made = batch(shape, [Sequence(17 + i % 5, 1) for i in range(decodes)] + [Sequence(60, 20)], torch.bfloat16)
    whole = attended(made, shape, -1, 20)
    table, lengths, starts = (x[decodes:] for x in (made.block_table, made.seq_lens, made.query_start_loc))
    found = attended(Batch(made.cache, table, lengths, starts, made.rotation, made.query), shape, -1, 20)
    assert bool((found[:decodes] == MARK).all())
    assert torch.equal(found[decodes : decodes + 20], whole[decodes : decodes + 20])


@pytest.mark.parametrize("queries", [1, 20])
def test_pages_before_the_window_may_hold_anything(queries: int) -> None:
    """vLLM frees them: another layer's bytes may lie in them, here scales that are NaN."""
    shape, window = Shape(64, 8, 4, 4, 1, 16), 20
    made = batch(shape, [Sequence(120, queries)], torch.bfloat16)
    kept = made.block_table[0, (120 - queries - window + 1) // 16 : 120 // 16 + 1].long()
    freed = torch.ones(made.cache.shape[0], dtype=torch.bool)
    freed[kept[kept < len(freed)]] = False
    made.cache[freed] = 255
    output = attended(made, shape, window, queries)
    clean = batch(shape, [Sequence(120, queries)], torch.bfloat16)
    assert torch.equal(output, attended(clean, shape, window, queries))
    found, allowed = errors(clean, shape, output, window)
    assert found <= 2 * allowed


@pytest.mark.parametrize("last", [0, 1])
def test_more_splits_than_a_merge_takes_at_a_time(last: int) -> None:
    shape = Shape(64, 8, 4, 4, 1, 64)
    pages = batch(shape, [Sequence(128, 1)], torch.bfloat16)
    # Either page's largest score comes first in one of the two orders.
    order = torch.full((1, 66), 1 - last)
    order[:, 64:] = last
    table, length = pages.block_table[:, order[0]], torch.tensor([4200], dtype=torch.int32)
    made = Batch(pages.cache, table, length, pages.query_start_loc, pages.rotation, 3 * pages.query)
    found, allowed = errors(made, shape, attended(made, shape, -1, 1, sms=16), -1)
    assert found <= 2 * allowed


def test_refusals() -> None:
    shape = Shape(64, 8, 4, 4, 1, 16)
    made = batch(shape, [Sequence(700, 1)], torch.bfloat16)
    arguments = (made.cache, torch.empty_like(made.query), made.block_table, made.seq_lens, made.query_start_loc)
    with pytest.raises(ResQError, match=r"needs a workspace of \d+ bytes, not 0"):
        attention(made.query, *arguments, made.rotation, 0.1, 8, 4, -1, 1, 700, None, num_sms=16)
    many = torch.zeros(1, 129 * made.cache.shape[1], 64, dtype=torch.bfloat16)
    with pytest.raises(ResQError, match=r"129 query heads for each KV head are more than the kernels' 128"):
        attention(many, made.cache, many, *arguments[2:], None, 0.1, 8, 4, -1, 1, 700, None, num_sms=16)
    with pytest.raises(ResQError, match=r"query and output must be alike"):
        attention(made.query.half(), *arguments, made.rotation, 0.1, 8, 4, -1, 1, 700, None, num_sms=16)
    with pytest.raises(ResQError, match=r"seq_lens must be int32"):
        attention(
            made.query,
            *arguments[:3],
            made.seq_lens.long(),
            made.query_start_loc,
            None,
            0.1,
            8,
            4,
            -1,
            1,
            9,
            None,
            num_sms=1,
        )


@pytest.mark.parametrize(("group", "window"), [(1, -1), (4, 50), (24, -1)])
def test_warm_up_runs(group: int, window: int) -> None:
    layout = KVLayout(64, 8)
    heads, longest, sms = 2 * group, 4096, 4
    size = workspace_bytes(8, heads, 2, 64, sms, max(1, 16 // group))
    workspace = torch.empty(size, dtype=torch.uint8, device=DEVICE) if size else None
    sizes = heads, 2, 64, layout.high, 4, 16, layout.bytes_per_token
    warm_up(torch.bfloat16, torch.device(DEVICE), *sizes, window, longest, workspace, num_sms=sms)
