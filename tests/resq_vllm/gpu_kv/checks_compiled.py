"""The kernels compiled for GPUs that are not there (run by test_kernels.py, one process a chip: RESQ_TEST_CHIP)."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache

import pytest
import torch

from resq_vllm.formats.kv_layout import KVLayout
from resq_vllm.gpu_kv import attention, kv_write, workspace_bytes, write_and_rotate
from resq_vllm.gpu_kv.schedule import PROGRAMS_PER_SM
from tests.resq_vllm.gpu_kv.offline import Compiled, compile_for

CHIP = int(os.environ["RESQ_TEST_CHIP"])
# Bytes of shared memory a program may have: sm_80 163 KiB, but sm_86 and sm_89, which run its code, 99 KiB.
SHARED = 227 * 1024 if CHIP == 90 else 99 * 1024
KV_HEADS, GROUP, BLOCK, TOKENS, SMS = 8, 4, 64, 16, 132

Launch = Callable[[int, str], dict[str, Compiled]]


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """launch(head_dim, "write" | "turn" | "decode" | "prefill"): what that compiles, by kernel."""
    compiled = compile_for(CHIP, tmp_path_factory.mktemp("cubins"))

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
    # One warp each; 1 KiB of every program's shared memory is the system's. sm_80's has room for 6 at head_dim 128.
    programs = PROGRAMS_PER_SM if CHIP == 90 else 6
    assert programs * (decode.shared + 1024) <= (228 if CHIP == 90 else 164) * 1024
    assert programs * 32 * decode.registers <= 65536
