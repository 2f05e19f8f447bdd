"""The kernels compiled for GPUs that are not there (run by test_kernels.py, one process a chip: RESQ_TEST_CHIP)."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache

import pytest
import torch
import triton

from resq_vllm.formats.kv_layout import KVLayout
from resq_vllm.gpu_kv import attention, kv_write, warm_up, workspace_bytes, write_and_rotate
from resq_vllm.gpu_kv.schedule import PROGRAMS_PER_SM
from tests.resq_vllm.gpu_kv.offline import Compiled, compile_for

CHIP = int(os.environ["RESQ_TEST_CHIP"])
# Bytes of shared memory a program may have: sm_80 163 KiB, but sm_86 and sm_89, which run its code, 99 KiB.
SHARED = 227 * 1024 if CHIP == 90 else 99 * 1024
KV_HEADS, GROUP, BLOCK, TOKENS, SMS = 8, 4, 64, 16, 132
# Decode programs that a processor holds at head_dim 128, before Triton 3.9 and from it on.
PROGRAMS = {80: (5, 6), 90: (7, 8)}
TRITON = tuple(map(int, triton.__version__.split(".")[:2]))

Launch = Callable[[int, str], dict[str, Compiled]]


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> list[Compiled]:
    """All launches of this process."""
    return compile_for(CHIP, tmp_path_factory.mktemp("cubins"))


@pytest.fixture(scope="module")
def launch(launches: list[Compiled]) -> Launch:
    """launch(head_dim, "write" | "turn" | "decode" | "prefill"): what that compiles, by kernel."""
    compiled = launches

    @cache
    def run(head_dim: int, what: str) -> dict[str, Compiled]:
        compiled.clear()
        layout = KVLayout(head_dim, head_dim // 8)
        cache = torch.zeros(4, KV_HEADS, BLOCK, layout.bytes_per_token, dtype=torch.uint8)
        query = torch.zeros(TOKENS, KV_HEADS * GROUP, head_dim, dtype=torch.bfloat16)
        key, rotation = query[:, :KV_HEADS], torch.eye(head_dim)
        slots, starts = torch.zeros(TOKENS, dtype=torch.int64), torch.arange(TOKENS + 1, dtype=torch.int32)
        if what == "write":
            kv_write(key, key, cache, slots, rotation, layout.high, 4)
        elif what == "turn":
            to_write = query, key, key, cache, torch.zeros_like(query), slots, starts
            write_and_rotate(*to_write, rotation, layout.high, 4)
        else:
            size = workspace_bytes(TOKENS, KV_HEADS * GROUP, KV_HEADS, head_dim, SMS)
            attention(
                query,
                cache,
                torch.zeros_like(query),
                torch.zeros(TOKENS, 4, dtype=torch.int32),
                torch.ones(TOKENS, dtype=torch.int32),
                starts,
                rotation,
                0.1,
                layout.high,
                4,
                -1,
                1 if what == "decode" else 2048,
                32768,
                torch.empty(size, dtype=torch.uint8),
                num_sms=SMS,
            )
        return {found.name: found for found in compiled}

    return run


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    ("what", "kernel", "others"),
    [
        ("write", "_write", set()),
        ("turn", "_write", set()),
        ("decode", "_decode", {"_rotate_query", "_merge"}),
        ("prefill", "_prefill", {"_rotate_query"}),
    ],
)
def test_kernels_fit_and_use_tensor_cores(
    launch: Launch, head_dim: int, what: str, kernel: str, others: set[str]
) -> None:
    found = launch(head_dim, what)
    assert set(found) == {kernel, *others}
    assert found[kernel].tensor_core_instructions > 0
    assert found[kernel].spills_in_loops == 0
    for one in found.values():
        assert one.shared <= SHARED


@pytest.mark.parametrize("head_dim", [64, 128])
def test_packed_words_are_copied_16_bytes_at_a_time(launch: Launch, head_dim: int) -> None:
    assert 16 in launch(head_dim, "decode")["_decode"].bytes_a_copy


@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_wave_of_decode_programs_is_resident_on_a_processor(launch: Launch, head_dim: int) -> None:
    decode = launch(head_dim, "decode")["_decode"]
    # One warp each; 1 KiB of every program's shared memory is the system's. Triton 3.6's take twice as much as 3.9's.
    programs = PROGRAMS[90 if CHIP == 90 else 80][TRITON >= (3, 9)]
    assert CHIP != 90 or programs >= PROGRAMS_PER_SM
    assert programs * (decode.shared + 1024) <= (228 if CHIP == 90 else 164) * 1024
    assert programs * 32 * decode.registers <= 65536


@pytest.mark.parametrize(("group", "window"), [(4, -1), (16, 100)])
def test_batches_need_no_kernel_that_warm_up_has_not_compiled(
    launches: list[Compiled], group: int, window: int
) -> None:
    kv_heads, head_dim, longest = 2, 64, 32768
    heads, layout = kv_heads * group, KVLayout(head_dim, 8)
    workspace = torch.empty(workspace_bytes(256, heads, kv_heads, head_dim, SMS, 16 // group), dtype=torch.uint8)
    sizes = heads, kv_heads, head_dim, layout.high, 4, BLOCK, layout.bytes_per_token
    launches.clear()
    warm_up(torch.bfloat16, torch.device("cpu"), *sizes, window, longest, workspace, num_sms=SMS)
    warm = {found.key for found in launches}
    assert {found.name for found in launches} == {"_write", "_rotate_query", "_decode", "_merge", "_prefill"}

    launches.clear()
    cache = torch.zeros(3, kv_heads, BLOCK, layout.bytes_per_token, dtype=torch.uint8)
    rotation = torch.eye(head_dim)
    # (sequences, query tokens of each, longest context): unsplit, split, speculated tokens, chunks of prompts.
    for sequences, queries, context in [(1, 1, 1), (3, 1, longest), (256, 1, longest), (5, 2, 300), (2, 700, 4000)]:
        tokens = sequences * queries
        # As vLLM has them: views of one matrix, rows of padding behind, slices that begin anywhere.
        qkv = torch.zeros(tokens + 3, heads + 2 * kv_heads, head_dim, dtype=torch.bfloat16)
        query, key, value = qkv.split([heads, kv_heads, kv_heads], 1)
        output = torch.zeros(tokens + 3, heads, head_dim, dtype=torch.bfloat16)
        slots = torch.zeros(tokens + 1, dtype=torch.int64)[1:]
        starts = torch.arange(-queries, tokens + 1, queries, dtype=torch.int32)[1:]
        write_and_rotate(query, key, value, cache, output, slots, starts, rotation, layout.high, 4)
        table = torch.zeros(sequences + 1, 7, dtype=torch.int32)[1:]
        lengths = torch.full((sequences + 1,), context, dtype=torch.int32)[1:]
        last = window, queries, context, workspace
        attention(output, cache, output, table, lengths, starts, None, 0.1, layout.high, 4, *last, num_sms=SMS)
    assert {found.key for found in launches} <= warm
