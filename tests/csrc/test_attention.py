"""attention over packed pages against the reference: no less exact than torch in float32, on every instruction set."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resq_vllm import ops, reference
from resq_vllm.formats.kv_layout import KVLayout
from tests.csrc.support import ISAS, assert_no_worse, generator, random_cache, running

LAYOUTS = [
    KVLayout(32, 4),
    KVLayout(64, 8),
    KVLayout(80, 10),
    KVLayout(96, 12),
    KVLayout(128, 16),
    KVLayout(64, 0),
    KVLayout(64, 8, 8),
    KVLayout(18, 5),
]
UNTOUCHED = 77.0


@dataclass
class Batch:
    """Sequences of (context, new tokens), context counting the new ones, over randomly placed blocks."""

    layout: KVLayout
    lengths: list[tuple[int, int]]
    kv_heads: int
    group: int
    block_size: int
    seed: int
    dtype: torch.dtype = torch.float32
    window: int = -1
    rotated: bool = True
    padding: int = 0

    def run(self) -> None:
        g = generator(self.seed)
        layout, size = self.layout, self.block_size
        needed = [-(-length // size) for length, _ in self.lengths]
        cache = random_cache(layout, sum(needed) + 1, self.kv_heads, size, self.seed)
        order = torch.randperm(sum(needed) + 1, generator=g).to(torch.int32)
        # Entries beyond a sequence's blocks name nothing, and must not be read.
        table = torch.full((len(needed), max(needed) + 2), -1, dtype=torch.int32)
        for row, blocks in enumerate(needed):
            table[row, :blocks] = order[sum(needed[:row]) : sum(needed[: row + 1])]
            _spoil_beyond(cache[table[row, blocks - 1]], layout, size, self.lengths[row][0] - (blocks - 1) * size)
        lens = torch.tensor([length for length, _ in self.lengths], dtype=torch.int32)
        starts = torch.tensor([0, *[new for _, new in self.lengths]]).cumsum(0).to(torch.int32)
        tokens = int(starts[-1])
        query = torch.randn(tokens + self.padding, self.kv_heads * self.group, layout.head_dim, generator=g)
        query = query.to(self.dtype)
        rotation = None
        if self.rotated:
            rotation = torch.linalg.qr(torch.randn(layout.head_dim, layout.head_dim, generator=g))[0].contiguous()
        scale = layout.head_dim**-0.5
        batch = (query, cache, table, lens, starts, rotation, scale, layout, self.window)
        exact = reference.attention(*batch, torch.float64)[:tokens]
        # Many query rows of a bfloat16 model are multiplied in bfloat16; everything else is as exact as float32.
        prefills = any(new * self.group > 16 and new > 1 for _, new in self.lengths)
        rounded = self.dtype == torch.bfloat16 and prefills
        same = (_bfloat16_attention(*batch) if rounded else reference.attention(*batch, torch.float32))[:tokens]
        for isa in ISAS:
            out = torch.full_like(query, UNTOUCHED)
            with running(isa):
                ops.attention(
                    query, cache, out, table, lens, starts, rotation, scale, layout.high, layout.low_bits, self.window
                )
            assert_no_worse(out[:tokens], same.to(self.dtype), exact, floor=3e-7)
            assert (out[tokens:] == UNTOUCHED).all(), isa


def _bfloat16_attention(
    query: torch.Tensor,
    cache: torch.Tensor,
    table: torch.Tensor,
    lens: torch.Tensor,
    starts: torch.Tensor,
    rotation: torch.Tensor | None,
    scale: float,
    layout: KVLayout,
    window: int,
) -> torch.Tensor:
    """What torch computes in bfloat16: rotated q, K̂, V̂ and P rounded to it, sums in float32."""
    out = torch.zeros_like(query)
    for row, length in enumerate(lens.tolist()):
        first, last = starts[row : row + 2].tolist()
        if first == last:
            continue
        q = query[first:last].float()
        q = (q if rotation is None else q @ rotation).bfloat16().float()
        key, value = (x.bfloat16().float() for x in reference.kv_read(cache, table[row], length, layout))
        heads = q.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(heads, dim=1) for x in (key, value))
        scores = torch.einsum("qhd,khd->hqk", q, key) * scale
        age = torch.arange(length - (last - first), length)[:, None] - torch.arange(length)[None]
        hidden = age < 0 if window < 0 else (age < 0) | (age >= window)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1).bfloat16().float()
        out[first:last] = torch.einsum("hqk,khd->qhd", weights, value).to(query.dtype)
    return out


def _spoil_beyond(block: torch.Tensor, layout: KVLayout, size: int, used: int) -> None:
    """NaN scales for the tokens that were never written."""
    at = layout.planes(size)
    scales = block.view(block.shape[0], -1)[:, at.scales : at.zeros].view(torch.float16)
    scales.view(block.shape[0], 2, layout.parts, size)[..., used:] = float("nan")


@settings(max_examples=25, deadline=None)
@given(
    layout=st.sampled_from(LAYOUTS),
    lengths=st.lists(st.tuples(st.integers(1, 150), st.integers(1, 40)), min_size=1, max_size=4),
    kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 3, 4, 8]),
    block_size=st.sampled_from([16, 32, 128]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    window=st.sampled_from([-1, -1, 1, 7, 64]),
    rotated=st.booleans(),
    padding=st.integers(0, 2),
    seed=st.integers(0, 2**31),
)
def test_any_batch(
    layout: KVLayout,
    lengths: list[tuple[int, int]],
    kv_heads: int,
    group: int,
    block_size: int,
    dtype: torch.dtype,
    window: int,
    rotated: bool,
    padding: int,
    seed: int,
) -> None:
    lengths = [(max(length, new), new) for length, new in lengths]
    Batch(layout, lengths, kv_heads, group, block_size, seed, dtype, window, rotated, padding).run()


@pytest.mark.parametrize("layout", [KVLayout(64, 8), KVLayout(128, 16)])
@pytest.mark.parametrize(
    "lengths",
    [[(150, 150)], [(300, 60)], [(1, 1)], [(257, 1), (64, 1), (16, 1), (33, 1)]],
    ids=["prefill", "chunked_prefill", "first_token", "decode"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_phases(layout: KVLayout, lengths: list[tuple[int, int]], dtype: torch.dtype) -> None:
    Batch(layout, lengths, 2, 4, 32, seed=5, dtype=dtype).run()


@pytest.mark.parametrize("layout", [KVLayout(64, 8), KVLayout(128, 16), KVLayout(96, 12), KVLayout(64, 0)])
@pytest.mark.parametrize("window", [-1, 100])
def test_prefill_of_several_blocks_and_panels(layout: KVLayout, window: int) -> None:
    for lengths, group, size in (([(400, 400)], 4, 128), ([(390, 170), (67, 67)], 3, 48), ([(200, 150)], 1, 16)):
        Batch(layout, lengths, 2, group, size, seed=13, dtype=torch.bfloat16, window=window).run()


@pytest.mark.parametrize("layout", [KVLayout(64, 8), KVLayout(128, 16), KVLayout(18, 5), KVLayout(256, 32)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decode_of_many_shapes(layout: KVLayout, dtype: torch.dtype) -> None:
    shapes = ((1, 128, 1, -1), (5, 48, 1, 90), (8, 16, 2, -1), (12, 128, 1, -1), (3, 32, 4, 5), (9, 32, 1, -1))
    for group, size, new, window in (*shapes, (7, 128, 1, 130)):
        lengths = [(300, new), (129, new), (new, new), (47, new)]
        Batch(layout, lengths, 3, group, size, seed=14, dtype=dtype, window=window).run()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [-1, 700])
@pytest.mark.parametrize("new", [1, 5])
def test_long_context_is_split_and_merged(new: int, window: int, dtype: torch.dtype) -> None:
    threads = torch.get_num_threads()
    for n in (1, 2, 5):
        torch.set_num_threads(n)
        try:
            Batch(KVLayout(64, 8), [(2500, new)], 1, 4, 128, seed=6, window=window, dtype=dtype).run()
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("threads", [1, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_one_thread_and_many_more_than_cores(threads: int, dtype: torch.dtype) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        Batch(KVLayout(64, 8), [(300, 120), (700, 1), (5, 5)], 2, 4, 32, seed=21, dtype=dtype).run()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5])
def test_few_query_rows(group: int, dtype: torch.dtype) -> None:
    """Up to four rows have a kernel of their own where AMX takes the others."""
    for size, new in ((128, 1), (256, 1), (16, 2)):
        Batch(KVLayout(64, 8), [(600, new), (131, new)], 3, group, size, seed=22, dtype=dtype).run()


def test_a_row_whose_first_blocks_lie_outside_its_window() -> None:
    """With a window, a panel of rows meets blocks of which some of its rows see no key."""
    for group, window in ((1, 40), (4, 130), (8, 129)):
        Batch(KVLayout(64, 8), [(700, 300)], 1, group, 128, seed=23, dtype=torch.bfloat16, window=window).run()


def test_scores_that_climb_from_block_to_block() -> None:
    """Every block's maximum lies above the last one's: by less and by more than what is kept without rescaling."""
    layout, size, context = KVLayout(64, 8), 128, 1024
    query = torch.randn(1, 2, 64, generator=generator(24)).expand(40, 2, 64).bfloat16().contiguous()
    direction = query[0].float().mean(0) / query[0].float().mean(0).norm()
    value = torch.randn(context, 1, 64, generator=generator(25))
    for slope in (0.01, 0.1, 1.0):
        climb = torch.arange(context)[:, None, None] * slope
        key = torch.randn(context, 1, 64, generator=generator(26)) * 0.1 + climb * direction
        cache = torch.zeros(context // size, 1, size, layout.bytes_per_token, dtype=torch.uint8)
        ops.kv_write(key, value, cache, torch.arange(context), None, 8, 4)
        table = torch.arange(context // size).int()[None]
        batch = (table, torch.tensor([context]).int(), torch.tensor([0, 40]).int(), None, 0.125)
        exact = reference.attention(query, cache, *batch, layout, dtype=torch.float64)
        torch_result = _bfloat16_attention(query, cache, *batch, layout, -1)
        for isa in ISAS:
            out = torch.empty_like(query)
            with running(isa):
                ops.attention(query, cache, out, *batch, 8, 4)
            assert_no_worse(out, torch_result, exact, floor=1e-3)


def test_more_heads_than_a_tile_has_rows() -> None:
    Batch(KVLayout(32, 4), [(40, 3)], 1, 71, 16, seed=7).run()


def test_writing_and_attending_is_both_ops() -> None:
    rotation = torch.linalg.qr(torch.randn(64, 64, generator=generator(30)))[0].contiguous()
    key, value, query = (torch.randn(20, heads, 64, generator=generator(31)).bfloat16() for heads in (2, 2, 8))
    slots = torch.cat([torch.arange(19) + 32, torch.tensor([-1])])
    table, lens, starts = (torch.tensor(x, dtype=torch.int32) for x in ([[2, 3]], [19], [0, 19]))
    batch = (table, lens, starts, rotation, 0.125, 8, 4, -1)
    one, two = (random_cache(KVLayout(64, 8), 4, 2, 16, 32) for _ in range(2))
    expected, out = (torch.zeros(19, 8, 64, dtype=torch.bfloat16) for _ in range(2))
    for isa in ISAS:
        with running(isa):
            ops.kv_write(key, value, one, slots, rotation, 8, 4)
            ops.attention(query[:19], one, expected, *batch)
            ops.kv_write_attention(query[:19], key, value, two, out, slots, *batch)
        assert torch.equal(one, two)
        assert torch.equal(out, expected)


@pytest.mark.parametrize(
    ("table", "lens"),
    [
        ([[0, 1, 9], [2, 9, 9], [3, 4, 5]], [45, 7, 71]),  # every sequence into a page of its own
        ([[0, 1, 9], [0, 1, 2]], [64, 65]),  # the second sees the token that fills the first one's page
        ([list(range(24))], [764]),  # one context, cut among the threads
    ],
    ids=["own", "shared", "cut"],
)
def test_a_decode_step_writes_and_attends_as_both_ops(table: list[list[int]], lens: list[int]) -> None:
    count = len(lens)
    rotation = torch.linalg.qr(torch.randn(64, 64, generator=generator(30)))[0].contiguous()
    key, value, query = (torch.randn(count, heads, 64, generator=generator(31)).bfloat16() for heads in (2, 2, 8))
    blocks = torch.tensor(table, dtype=torch.int32)
    last = torch.tensor(lens) - 1
    slots = blocks[torch.arange(count), last // 32].long() * 32 + last % 32
    batch = (blocks, torch.tensor(lens).int(), torch.arange(count + 1).int(), rotation, 0.125, 8, 4, -1)
    for isa in ISAS:
        one, two = (random_cache(KVLayout(64, 8), 24, 2, 32, 32) for _ in range(2))
        expected, out = (torch.zeros(count, 8, 64, dtype=torch.bfloat16) for _ in range(2))
        with running(isa):
            ops.kv_write(key, value, one, slots, rotation, 8, 4)
            ops.attention(query, one, expected, *batch)
            ops.kv_write_attention(query, key, value, two, out, slots, *batch)
        assert torch.equal(one, two)
        assert torch.equal(out, expected)


def test_chunks_agree_with_one_prefill() -> None:
    layout, size, tokens = KVLayout(64, 8), 16, 90
    cache = random_cache(layout, 6, 2, size, 8)
    query = torch.randn(tokens, 8, 64, generator=generator(8))
    table = torch.arange(6, dtype=torch.int32)[None]

    def run(first: int, last: int) -> torch.Tensor:
        out = torch.empty(last - first, 8, 64)
        lens, starts = torch.tensor([last], dtype=torch.int32), torch.tensor([0, last - first], dtype=torch.int32)
        ops.attention(query[first:last], cache, out, table, lens, starts, None, 0.125, 8, 4)
        return out

    whole = run(0, tokens)
    pieces = torch.cat([run(0, 33), run(33, 34), run(34, 80), run(80, tokens)])
    torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_query_output_and_cache(dtype: torch.dtype) -> None:
    layout = KVLayout(64, 8)
    wide_cache = random_cache(layout, 6, 4, 16, 9).view(3, 2, 4, 16, -1)
    cache = wide_cache[:, 1, ::2]
    fused = torch.randn(20, 12, 64, generator=generator(9)).to(dtype)
    query, wide_out = fused[:, :8], torch.full((20, 16, 64), UNTOUCHED, dtype=dtype)
    arguments = (torch.tensor([[2, 0, 1]]).int(), torch.tensor([40]).int(), torch.tensor([0, 20]).int(), None, 0.2)
    ops.attention(query, cache, wide_out[:, ::2], *arguments, 8, 4)
    expected = torch.empty(20, 8, 64, dtype=dtype)
    ops.attention(query.contiguous(), cache.contiguous(), expected, *arguments, 8, 4)
    assert torch.equal(wide_out[:, ::2], expected)
    assert (wide_out[:, 1::2] == UNTOUCHED).all()


def test_sequences_without_new_tokens_are_skipped() -> None:
    cache = random_cache(KVLayout(64, 8), 1, 1, 16, 10)
    query, out = torch.randn(1, 1, 64), torch.full((1, 1, 64), UNTOUCHED)
    table = torch.tensor([[-1], [0], [-1]]).int()
    lens, starts = torch.tensor([0, 9, 16]).int(), torch.tensor([0, 0, 1, 1]).int()
    ops.attention(query, cache, out, table, lens, starts, None, 0.125, 8, 4)
    assert out.isfinite().all()
    assert (out != UNTOUCHED).all()
    ops.attention(query[:0], cache, out[:0], table[:0], lens[:0], starts[:1], None, 0.125, 8, 4)


def test_huge_scores_do_not_overflow() -> None:
    layout = KVLayout(64, 8)
    cache = random_cache(layout, 4, 1, 16, 11)
    query = torch.randn(3, 2, 64, generator=generator(11)) * 1e4
    table, lens, starts = torch.arange(4).int()[None], torch.tensor([60]).int(), torch.tensor([0, 3]).int()
    expected = reference.attention(query, cache, table, lens, starts, None, 1.0, layout, dtype=torch.float64)
    for isa in ISAS:
        out = torch.empty(3, 2, 64)
        with running(isa):
            ops.attention(query, cache, out, table, lens, starts, None, 1.0, 8, 4)
        torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("magnitude", [0.0, 1e-30, 1e3])
def test_queries_of_any_magnitude_in_bfloat16(tokens: int, magnitude: float) -> None:
    layout = KVLayout(64, 8)
    cache = random_cache(layout, 4, 1, 16, 15)
    query = (torch.randn(tokens, 2, 64, generator=generator(15)) * magnitude).bfloat16()
    batch = (torch.arange(4).int()[None], torch.tensor([60]).int(), torch.tensor([0, tokens]).int(), None, 0.125)
    exact = reference.attention(query, cache, *batch, layout, dtype=torch.float64)
    torch_result = _bfloat16_attention(query, cache, *batch, layout, -1)
    for isa in ISAS:
        out = torch.empty_like(query)
        with running(isa):
            ops.attention(query, cache, out, *batch, 8, 4)
        assert_no_worse(out, torch_result, exact, floor=2**-8)


@pytest.mark.parametrize("tokens", [1, 33])
def test_a_sink_does_not_drown_the_tail(tokens: int) -> None:
    """One key takes half of the weight; what the thousands of others add up to must survive."""
    layout, size, context = KVLayout(64, 8), 128, 2048
    key, value = torch.randn(context, 1, 64, generator=generator(16)) * 0.05, torch.ones(context, 1, 64)
    query = torch.randn(1, 2, 64, generator=generator(17)).expand(tokens, 2, 64).bfloat16().contiguous()
    key[0] = query[0].float().mean(0) * (8 * math.log(context)) / query[0].float().mean(0).square().sum()
    value[0] = -1.0
    cache = torch.zeros(context // size, 1, size, layout.bytes_per_token, dtype=torch.uint8)
    ops.kv_write(key, value, cache, torch.arange(context), None, 8, 4)
    table, lens = torch.arange(context // size).int()[None], torch.tensor([context]).int()
    batch = (table, lens, torch.tensor([0, tokens]).int(), None, 0.125)
    exact = reference.attention(query, cache, *batch, layout, dtype=torch.float64)
    assert exact.abs().max() < 0.9
    torch_result = _bfloat16_attention(query, cache, *batch, layout, -1)
    for isa in ISAS:
        out = torch.empty_like(query)
        with running(isa):
            ops.attention(query, cache, out, *batch, 8, 4)
        assert_no_worse(out, torch_result, exact, floor=1e-3)


@pytest.mark.parametrize(("layout", "group"), [(KVLayout(64, 8), 1), (KVLayout(128, 16), 4), (KVLayout(64, 0), 8)])
def test_values_and_queries_of_very_different_sizes_in_bfloat16(layout: KVLayout, group: int) -> None:
    """A sink with hardly any value, tokens of zeros, values up to 100 times others', and dims of q up to 30 times."""
    size, context, tokens, dims = 128, 700, 60, layout.head_dim
    g = generator(27)
    query = torch.randn(tokens, group, dims, generator=g)
    query[:, :, 3] *= 30
    query = query.bfloat16()
    sizes = torch.pow(10.0, torch.rand(context, 1, 1, generator=g) * 2 - 2)
    key, value = torch.randn(context, 1, dims, generator=g) * 0.1, torch.randn(context, 1, dims, generator=g) * sizes
    key[0] = query.float().mean((0, 1)) / query.float().mean((0, 1)).square().sum() * 60
    value[0] *= 1e-3
    value[5:9] = 0.0
    cache = torch.zeros(6, 1, size, layout.bytes_per_token, dtype=torch.uint8)
    ops.kv_write(key, value, cache, torch.arange(context), None, layout.high, layout.low_bits)
    table, lens = torch.arange(6).int()[None], torch.tensor([context]).int()
    batch = (table, lens, torch.tensor([0, tokens]).int(), None, dims**-0.5)
    exact = reference.attention(query, cache, *batch, layout, dtype=torch.float64)
    torch_result = _bfloat16_attention(query, cache, *batch, layout, -1)
    for isa in ISAS:
        out = torch.empty_like(query)
        with running(isa):
            ops.attention(query, cache, out, *batch, layout.high, layout.low_bits)
        assert_no_worse(out, torch_result, exact)


def test_bad_arguments_are_named() -> None:
    layout = KVLayout(64, 8)
    cache = random_cache(layout, 2, 2, 16, 12)
    query = torch.randn(2, 4, 64)
    table, lens, starts = torch.tensor([[0, 1]]).int(), torch.tensor([20]).int(), torch.tensor([0, 2]).int()

    def call(
        query: torch.Tensor = query,
        table: torch.Tensor = table,
        lens: torch.Tensor = lens,
        starts: torch.Tensor = starts,
        window: int = -1,
    ) -> None:
        ops.attention(query, cache, torch.empty_like(query), table, lens, starts, None, 0.1, 8, 4, window)

    call()
    for message, arguments in {
        "sequence 0: block_table names block 2 of 2": {"table": table + 1},
        "block_table is too short for its length 33": {"lens": lens + 13},
        "sequence 0 has more new tokens than its seq_lens 1": {"lens": lens - 19},
        "query_start_loc is not ascending within query's 2 tokens": {"starts": starts + 1},
        "query's 3 heads are no multiple of the cache's 2 kv heads": {"query": query[:, :3]},
        "seq_lens must be int32": {"lens": lens.long()},
        "sliding_window must be positive": {"window": 0},
    }.items():
        with pytest.raises(RuntimeError, match=message):
            call(**arguments)  # type: ignore[arg-type]
