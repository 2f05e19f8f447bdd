"""Index maths of the CUDA kernels: weight layout, shared-memory places, shares of the work."""

from __future__ import annotations

import ctypes
import itertools
import json
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resq_vllm import ops
from resq_vllm.formats.plan import LinearPlan, Segment
from resq_vllm.quantized_linear import KERNELS
from tests.csrc.cuda.support import Layer, emulation
from tools.cuda_report import LIMITS as LIMITS_FILE

LIMITS = json.loads(LIMITS_FILE.read_text())
BLOCK_BYTES, TABLE_BYTES, TILE = 512, 512, 16


def place(channel: int, column: int, nibbles: bool) -> tuple[int, int]:
    shift = ctypes.c_int()
    return emulation().resq_weight_byte(channel, column, int(nibbles), ctypes.byref(shift)), shift.value


@pytest.mark.parametrize(("nibbles", "columns"), [(True, 64), (False, 32)])
def test_a_block_holds_every_weight_once(nibbles: bool, columns: int) -> None:
    places = {place(channel, column, nibbles) for channel in range(TILE) for column in range(columns)}
    shifts = (0, 4) if nibbles else (0,)
    assert places == {(byte, shift) for byte in range(BLOCK_BYTES) for shift in shifts}


@pytest.mark.parametrize("nibbles", [True, False])
def test_a_lane_has_the_columns_of_its_fragments(nibbles: bool) -> None:
    """mma.m16n8k32: lane 4g + q, rows g and g + 8, columns 4q..4q+3 and 16+4q..; rows are channels 2g and 2g + 1."""
    for channel in range(TILE):
        for column in range(64 if nibbles else 32):
            byte, _ = place(channel, column, nibbles)
            assert byte // 16 == channel // 2 * 4 + column // 4 % 4
            assert byte % 4 == column % 4


@pytest.mark.parametrize("low_bits", [4, 8])
@pytest.mark.parametrize("outputs", [1, 16, 37])
def test_packed_weights_unpack_to_the_checkpoints(low_bits: int, outputs: int) -> None:
    plan = LinearPlan((Segment(100, 0, 0), Segment(12, 1, 1), Segment(36, 0, 2)), (4, 8, 4))
    layer = Layer(plan, 1, outputs, low_bits)
    layer.problem()
    body = layer.packed[TABLE_BYTES:]
    seen = torch.zeros_like(body, dtype=torch.bool)
    blocks = body.numel() // BLOCK_BYTES // -(-outputs // TILE)
    first = 0
    for run in plan.runs:
        nibbles = run.part == 0 and low_bits == 4
        width = 64 if nibbles else 32
        weights = (layer.low, layer.high)[run.part][:, run.start : run.start + run.length]
        for n in range(outputs):
            for k in range(run.length):
                byte, shift = place(n % TILE, k % width, nibbles)
                at = ((n // TILE) * blocks + first + k // width) * BLOCK_BYTES + byte
                value = (int(body[at]) >> shift) & 15 if nibbles else int(body[at])
                limit = 8 if nibbles else 128
                assert (value + limit) % (2 * limit) - limit == int(weights[n, k])
                seen[at] = True
        first += -(-run.length // width)
    assert first == blocks
    assert not body[~seen].any(), "padding is not 0"


@pytest.mark.parametrize("low_bits", [4, 8])
@pytest.mark.parametrize("outputs", [1, 16, 37])
def test_python_knows_the_size_of_the_packed_weight(low_bits: int, outputs: int) -> None:
    plan = LinearPlan(tuple(Segment(40, part, group) for group, part in enumerate((0, 1) * 10)), (8,) * 20)
    layer = Layer(plan, 1, outputs, low_bits)
    layer.problem()
    assert ops._cuda_packed_bytes(plan.runs, (low_bits, 8), outputs) == layer.packed.numel()


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 600), st.integers(1, 40))
def test_splits_cover_every_block_once(blocks: int, splits: int) -> None:
    splits = min(splits, blocks)
    lib = emulation()
    covered: list[int] = []
    for split in range(splits):
        begin, end = lib.resq_split_begin(blocks, splits, split), lib.resq_split_end(blocks, splits, split)
        assert end - begin in (blocks // splits, -(-blocks // splits))
        covered += range(begin, end)
        assert all(lib.resq_split_of(blocks, splits, block) == split for block in range(begin, end))
    assert covered == list(range(blocks))


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(1, 16))
def test_partial_sums_have_a_slot_of_their_own(run_blocks: list[int], splits: int) -> None:
    blocks = sum(run_blocks)
    splits = min(splits, blocks)
    run_of = [run for run, count in enumerate(run_blocks) for _ in range(count)]
    pairs = {(emulation().resq_split_of(blocks, splits, block), run_of[block]) for block in range(blocks)}
    slots = [split + run for split, run in pairs]
    assert len(set(slots)) == len(slots)
    assert max(slots) < splits + len(run_blocks) - 1


# 10·major + minor, processors, shared memory of one, whether it has wgmma, whether int4.
HOPPER = (90, 132, 228 << 10, 1, 0)


@settings(deadline=None, max_examples=300)
@given(
    st.sampled_from(
        [
            (80, 108, 164 << 10, 0, 1),
            (86, 82, 100 << 10, 0, 1),
            (89, 142, 100 << 10, 0, 1),
            HOPPER,
            (90, 132, 228 << 10, 0, 0),
            (120, 170, 100 << 10, 0, 0),
        ]
    ),
    st.integers(1, 9000),
    st.integers(1, 130000),
    st.integers(1, 500),
    st.integers(1, 120),
    st.booleans(),
)
def test_every_chip_and_shape_has_a_kernel(
    chip: tuple[int, ...], m: int, n: int, blocks: int, runs: int, four_bits: bool
) -> None:
    runs = min(runs, blocks)
    splits, facts = ctypes.c_int(), (ctypes.c_int64 * 6)()
    index = emulation().resq_choose(
        *chip, ctypes.c_int64(m), ctypes.c_int64(n), blocks, runs, int(four_bits), ctypes.byref(splits), facts
    )
    name = emulation().resq_kernel_name(index).decode()
    tokens, _, whole, split, partial, tiles = facts
    assert not name.startswith("decode") or m <= tokens
    assert split if splits.value > 1 else whole
    assert 1 <= splits.value <= min(blocks, 8)
    assert partial <= 32 << 20
    assert splits.value == 1 or tiles <= 1 << 14
    assert splits.value == 1 or tokens <= 16 or tiles < chip[1]
    assert not name.startswith("wgmma") or chip[3]
    assert not name.endswith("s4") or (chip[4] and four_bits)


@pytest.mark.parametrize(
    ("tokens", "outputs", "columns", "kernel"),
    [
        # Tiles that fill the chip are not split: their partial sums would be as large as the weights.
        (32, 28672, 4096, "tiled_m32_n128 x1"),
        # mma.sync would bound 64 tokens, wgmma does not.
        (33, 28672, 4096, "wgmma_m64_n128 x1"),
        (64, 28672, 4096, "wgmma_m64_n128 x1"),
        (64, 14336, 4096, "wgmma_m64_n128 x1"),
        # 32 tiles of 132 processors are shared, but by fewer CTAs than have room: one of them adds all sums up.
        (64, 4096, 14336, "tiled_m64_n128_split x5"),
        (32, 4096, 4096, "tiled_m32_n128_split x4"),
        (1, 4096, 4096, "decode_m8_n32 x2"),
        (16, 28672, 4096, "decode_m16_n64 x1"),
        (65, 28672, 4096, "wgmma_m128_n128 x1"),
    ],
)
def test_choices_for_llama_on_hopper(tokens: int, outputs: int, columns: int, kernel: str) -> None:
    """Seven eighths of the columns at 4 bits, one at 8; two runs."""
    splits, facts = ctypes.c_int(), (ctypes.c_int64 * 6)()
    blocks = columns * 7 // 8 // 64 + columns // 8 // 32
    index = emulation().resq_choose(
        *HOPPER, ctypes.c_int64(tokens), ctypes.c_int64(outputs), blocks, 2, 1, ctypes.byref(splits), facts
    )
    assert f"{emulation().resq_kernel_name(index).decode()} x{splits.value}" == kernel


@pytest.mark.parametrize(
    ("shared", "resident"),
    [
        (228 << 10, {"decode_m8_n64": 2, "decode_m16_n64": 2, "tiled_m32_n128_split": 3, "tiled_m64_n128_split": 3}),
        (164 << 10, {"decode_m8_n64": 1, "decode_m16_n64": 1, "tiled_m32_n128_split": 3, "tiled_m64_n128_split": 2}),
        (100 << 10, {"decode_m8_n64": 1, "decode_m8_n32": 1, "tiled_m32_n128_split": 2, "tiled_m64_n128_split": 1}),
    ],
)
def test_resident_ctas_follow_from_shared_memory(shared: int, resident: dict[str, int]) -> None:
    facts = (ctypes.c_int * 3)()
    for index, name in enumerate(KERNELS):
        assert emulation().resq_kernel_shape(index, shared, facts) is not None
        _, most, held = facts
        assert 1 <= held <= most
        assert held == resident.get(name, held)


def test_recorded_registers_leave_room_for_the_ctas() -> None:
    """What ptxas used (limits.json), for every chip; registers are given out to warps, 8 a thread at a time."""
    recorded = {kernel: archs for kernels in LIMITS["registers"].values() for kernel, archs in kernels.items()}
    facts = (ctypes.c_int * 3)()
    for index, name in enumerate(KERNELS):
        shape = emulation().resq_kernel_shape(index, 228 << 10, facts).decode()
        threads, ctas, _ = facts
        # Default arguments of a template are written out there.
        instance = re.compile(rf"<{re.escape(shape[:-1])}(, false)?>")
        found = [archs for kernel, archs in recorded.items() if instance.search(kernel)]
        assert len(found) == 1, name
        for arch, registers in found[0].items():
            assert ctas * threads * (-(-registers // 8) * 8) <= 65536, f"{name} for {arch}"


def test_table_of_kernels_is_the_one_that_python_knows() -> None:
    names = (emulation().resq_kernel_name(index) for index in itertools.count())
    assert [name.decode() for name in itertools.takewhile(lambda name: name is not None, names)] == list(KERNELS)


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 60), st.integers(1, 40))
def test_every_output_tile_has_one_index(channels: int, tokens: int) -> None:
    lib = emulation()
    places = [
        (lib.resq_tile_channel(i, channels, tokens), lib.resq_tile_token(i, channels, tokens))
        for i in range(channels * tokens)
    ]
    assert sorted(places) == [(c, t) for c in range(channels) for t in range(tokens)]


def test_chunks_of_a_matrix_lie_in_different_banks() -> None:
    offsets = [[emulation().resq_chunk_offset(row, chunk) for chunk in range(4)] for row in range(8)]
    assert sorted(o for row in offsets for o in row) == list(range(0, 512, 16))
    for chunk in range(4):
        assert len({offsets[row][chunk] % 128 for row in range(8)}) == 8
    for row in range(0, 8, 2):  # what eight lanes of a copy write
        assert len({o % 128 for r in (row, row + 1) for o in offsets[r]}) == 8
