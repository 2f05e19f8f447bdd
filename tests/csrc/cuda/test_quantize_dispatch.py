"""Which rows the kernel of contiguous rows takes (contiguous_rows, which launch_quantize asks), and its launches."""

from __future__ import annotations

import ctypes

import pytest
import torch

from resq_vllm import reference
from resq_vllm.formats.activations import ActivationLayout
from resq_vllm.formats.metadata import LinearSite
from resq_vllm.formats.plan import LinearPlan, Segment, linear_plan
from tests.csrc.cuda.quantize_support import aligned_copy, emulation, run_quantize


def _held(rows: int, columns: int) -> int:
    return int(emulation().resq_held_vectors(ctypes.c_int64(rows), ctypes.c_int64(columns // 8)))


@pytest.mark.parametrize("scales", ["part", "token"])
@pytest.mark.parametrize("low_bits", [4, 8])
@pytest.mark.parametrize("weight_group", [0, 128])
@pytest.mark.parametrize("rows", [1, 300])
@pytest.mark.parametrize("columns", [2048, 3072, 4096, 5120, 8192, 16384])
def test_inputs_of_llama_s_layers_are_taken(
    columns: int, rows: int, weight_group: int, low_bits: int, scales: str
) -> None:
    high = columns // 8
    site = LinearSite.model_validate(
        {"low": columns - high, "high": high, "scales": scales, "act_low_bits": low_bits, "weight_group": weight_group}
    )
    plan = linear_plan(site, columns, 128)
    x = torch.randn(1, columns, generator=torch.Generator().manual_seed(columns)).bfloat16()
    expected = reference.quantize_activation(x, plan)
    for nibbles in (False, True):
        codes, scale, zero = run_quantize(x, plan, nibbles=nibbles, held=_held(rows, columns))
        assert torch.equal(scale, expected[1])
        assert torch.equal(zero, expected[2])
        assert torch.equal(codes, ActivationLayout(plan, nibbles).pack(expected[0]))


@pytest.mark.parametrize("columns", [8, 64, 128, 256])
@pytest.mark.parametrize("nibbles", [False, True])
def test_one_part_keeps_its_padding(columns: int, nibbles: bool) -> None:
    plan = LinearPlan((Segment(columns, 0, 0),), (4,))
    x = torch.randn(2, columns, generator=torch.Generator().manual_seed(columns)).bfloat16()
    codes = run_quantize(x, plan, nibbles=nibbles, held=4)[0]
    assert torch.equal(codes, ActivationLayout(plan, nibbles).pack(reference.quantize_activation(x, plan)[0]))


@pytest.mark.parametrize("column_order", [False, True])
@pytest.mark.parametrize("sizes", [(64, 64), (96, 160)])
def test_two_groups_in_a_part_without_padding_are_taken(sizes: tuple[int, int], column_order: bool) -> None:
    plan = LinearPlan((Segment(sizes[0], 0, 0), Segment(sizes[1], 0, 1)), (4, 8))
    x = torch.randn(2, plan.columns, generator=torch.Generator().manual_seed(1)).half()
    expected = reference.quantize_activation(x, plan)
    ours = run_quantize(x, plan, held=1, column_order=column_order)
    assert torch.equal(ours[0], expected[0])
    assert torch.equal(ours[1], expected[1])
    assert torch.equal(ours[2], expected[2])


def _site(low: int, high: int, **more: object) -> LinearPlan:
    return linear_plan(LinearSite.model_validate({"low": low, "high": high, **more}), low + high, 128)


@pytest.mark.parametrize(
    ("plan", "dtype"),
    [
        (LinearPlan((Segment(64, 0, 0),), (4,)), torch.float32),
        (LinearPlan((Segment(16392, 0, 0),), (4,)), torch.bfloat16),
        (_site(3588, 516), torch.bfloat16),
        (_site(3588, 508), torch.float16),
        (LinearPlan((Segment(4095, 0, 0),), (4,)), torch.bfloat16),
        (LinearPlan((Segment(56, 0, 0), Segment(8, 1, 1)) * 2, (4, 8)), torch.bfloat16),
        (_site(3584, 512, scales="head", order="heads"), torch.bfloat16),
        (LinearPlan((Segment(56, 0, 0), Segment(56, 0, 1)), (4, 4)), torch.bfloat16),
        (LinearPlan((Segment(80, 0, 0), Segment(16, 1, 1)), (4, 8), weight_group=40), torch.bfloat16),
        (LinearPlan((Segment(64, 0, 0),), (4,), hadamard_groups=1), torch.bfloat16),
        (_site(1024, 0, scales="block", hadamard_groups=2), torch.float16),
    ],
    ids=[
        "float32",
        "wide",
        "odd columns",
        "odd parts",
        "odd row",
        "heads",
        "scales by head",
        "two groups in a part",
        "padded runs",
        "hadamard",
        "blocks",
    ],
)
def test_other_rows_are_left_to_the_other_kernels(plan: LinearPlan, dtype: torch.dtype) -> None:
    with pytest.raises(RuntimeError, match="not contiguous"):
        run_quantize(torch.zeros(1, plan.columns, dtype=dtype), plan, held=4)


@pytest.mark.parametrize("column_order", [False, True])
def test_more_than_two_pieces_are_left_to_the_other_kernels(column_order: bool) -> None:
    plan = LinearPlan((Segment(64, 0, 0), Segment(32, 0, 1), Segment(32, 0, 2)), (4, 8, 4))
    with pytest.raises(RuntimeError, match="not contiguous"):
        run_quantize(torch.zeros(1, 128, dtype=torch.float16), plan, held=1, column_order=column_order)


def test_silu_mul_is_left_to_the_other_kernels() -> None:
    plan = LinearPlan((Segment(64, 0, 0),), (4,))
    with pytest.raises(RuntimeError, match="not contiguous"):
        run_quantize(torch.zeros(1, 128, dtype=torch.bfloat16), plan, held=1, silu_mul=True)


def test_misaligned_tensors_are_left_to_the_other_kernels() -> None:
    plan = LinearPlan((Segment(64, 0, 0),), (4,))
    x, ones = torch.zeros(1, 64, dtype=torch.bfloat16), aligned_copy(torch.ones(72, dtype=torch.bfloat16))
    misaligned, residual = ones[1:65], aligned_copy(x)
    run_quantize(x, plan, held=1, weight=ones[:64], residual=residual)
    with pytest.raises(RuntimeError, match="not contiguous"):
        run_quantize(x, plan, held=1, weight=misaligned, residual=residual)
    with pytest.raises(RuntimeError, match="not contiguous"):
        run_quantize(x, plan, held=1, weight=ones[:64], residual=misaligned[None])


@pytest.mark.parametrize("rows", [1, 256, 257, 100_000])
def test_launches_hold_every_vector(rows: int) -> None:
    for vectors in range(1, 2049):
        held = _held(rows, 8 * vectors)
        threads = emulation().resq_contiguous_threads(ctypes.c_int64(vectors), ctypes.c_int64(held))
        assert threads % 32 == 0
        assert vectors <= threads * held < vectors + 32 * held
        assert threads <= {1: 1024, 4: 512}[held], "the kernel's launch bounds"
    assert (_held(rows, 4096) == 1) == (rows <= 256)
