"""The GEMM kernels' own source, run on the host with the tensor-core instructions emulated from the PTX ISA."""

from __future__ import annotations

import pytest
import torch

from resq_vllm.formats.plan import LinearPlan, Segment
from tests.csrc.cuda.support import Layer

TWO_PARTS = LinearPlan((Segment(448, 0, 0), Segment(64, 1, 1)), (4, 8))
# A scale a Hadamard block, low only; block lengths that end within a 64-column block of weights.
BLOCKS = LinearPlan(tuple(Segment(96, 0, g) for g in range(5)), (4,) * 5)
# Heads of [low | high], one scale for all: runs of 224 and 32 columns after merging.
HEADS = LinearPlan((Segment(56, 0, 0), Segment(8, 1, 0)) * 4, (8,))
# Scales a head: runs of 56 and 8 columns, all padded, in turns of low and high.
SCALE_PER_HEAD = LinearPlan((Segment(56, 0, 0), Segment(8, 1, 1), Segment(56, 0, 2), Segment(8, 1, 3)), (4, 8, 4, 8))
WEIGHT_GROUPS = LinearPlan((Segment(384, 0, 0), Segment(64, 1, 1)), (4, 8), weight_group=128)
# Eight runs, of 1 to 7 blocks: splits begin and end within runs, and hold several.
EIGHT_RUNS = LinearPlan(
    tuple(Segment(columns, run % 2, run) for run, columns in enumerate((448, 96, 56, 8, 320, 40, 64, 200))), (4, 8) * 4
)
HIGH_ONLY = LinearPlan((Segment(320, 1, 0),), (8,))
PLANS = {
    "two parts": TWO_PARTS,
    "blocks": BLOCKS,
    "heads": HEADS,
    "scale per head": SCALE_PER_HEAD,
    "weight groups": WEIGHT_GROUPS,
    "high only": HIGH_ONLY,
}

DECODE = {"decode_m8_n32": 8, "decode_m8_n64": 8, "decode_m16_n32": 16, "decode_m16_n64": 16}
SPLIT = {"tiled_m32_n128_split": 32, "tiled_m64_n128_split": 64, "tiled_m128_n128_split": 128}
TILED = {"tiled_m32_n128": 32, "tiled_m64_n128": 64, "tiled_m128_n128": 128}
WHOLE = TILED | {"wgmma_m64_n128": 64, "wgmma_m128_n128": 128}
INT4 = {"tiled_m64_n128_s4": 64, "tiled_m128_n128_s4": 128}
FOUR_BIT_PLANS = [
    name for name, plan in PLANS.items() if all(r.part == 1 or plan.group_bits[r.group] == 4 for r in plan.runs)
]
KERNELS = DECODE | SPLIT | WHOLE


def check(layer: Layer, kernel: str, dtype: torch.dtype, splits: int = 1) -> None:
    """y and the integers of every run equal the reference bit for bit."""
    assert torch.equal(layer.run(kernel, dtype, splits), layer.expected(dtype))
    for run, expected in enumerate(layer.integers()):
        assert torch.equal(layer.run(kernel, dtype, splits, raw_run=run), expected)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("plan", PLANS)
def test_equals_the_reference_for_every_plan(kernel: str, plan: str) -> None:
    tokens = KERNELS[kernel] - 3 if kernel in DECODE else KERNELS[kernel] + 5
    check(Layer(PLANS[plan], tokens, 150, bias_dtype=torch.bfloat16), kernel, torch.bfloat16)


@pytest.mark.parametrize("kernel", INT4)
@pytest.mark.parametrize("plan", FOUR_BIT_PLANS)
@pytest.mark.parametrize("low_bits", [4, 8])
def test_four_bit_instruction_equals_the_reference(kernel: str, plan: str, low_bits: int) -> None:
    check(Layer(PLANS[plan], INT4[kernel] + 5, 150, low_bits), kernel, torch.float16)


@pytest.mark.parametrize("kernel", DECODE | SPLIT)
@pytest.mark.parametrize("plan", ["two parts", "blocks", "scale per head"])
@pytest.mark.parametrize("splits", [2, 3])
def test_equals_the_reference_when_ctas_share_a_tile(kernel: str, plan: str, splits: int) -> None:
    check(Layer(PLANS[plan], min(KERNELS[kernel], 40), 144), kernel, torch.float16, splits)


@pytest.mark.parametrize("kernel", DECODE | SPLIT)
@pytest.mark.parametrize("splits", [5, 8])
def test_many_ctas_share_a_tile_of_many_runs(kernel: str, splits: int) -> None:
    assert len(EIGHT_RUNS.runs) == 8
    check(Layer(EIGHT_RUNS, min(KERNELS[kernel], 70) - 3, 130, bias_dtype=torch.float16), kernel, torch.float32, splits)


@pytest.mark.parametrize("kernel", KERNELS)
def test_eight_bit_weights_in_both_parts(kernel: str) -> None:
    check(Layer(TWO_PARTS, 3, 33, low_bits=8), kernel, torch.float32)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("tokens", "outputs"), [(1, 1), (1, 16), (2, 17), (7, 129), (8, 256)])
def test_edges_of_tiles(kernel: str, tokens: int, outputs: int) -> None:
    check(Layer(HEADS, tokens, outputs, bias_dtype=torch.float32), kernel, torch.bfloat16)


@pytest.mark.parametrize("kernel", WHOLE)
def test_several_tiles_of_tokens(kernel: str) -> None:
    check(Layer(TWO_PARTS, 2 * KERNELS[kernel] + 1, 260), kernel, torch.bfloat16)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("seed", range(3))
def test_result_does_not_depend_on_the_order_of_threads(kernel: str, seed: int) -> None:
    plan = LinearPlan((Segment(1792, 0, 0), Segment(256, 1, 1)), (4, 8))
    layer = Layer(plan, 5, 64)
    splits = 1 if kernel in WHOLE else 1 + seed
    assert torch.equal(layer.run(kernel, torch.bfloat16, splits, seed=seed), layer.expected(torch.bfloat16))


@pytest.mark.parametrize("kernel", KERNELS)
def test_largest_codes_do_not_overflow(kernel: str) -> None:
    layer = Layer(LinearPlan((Segment(4096, 0, 0), Segment(256, 1, 0)), (8,)), 1, 16)
    layer.low.fill_(-8)
    layer.high.fill_(-128)
    layer.codes.fill_(255)
    layer.zero.fill_(0)
    layer.sums = torch.tensor([[-8 * 4096] * 16, [-128 * 256] * 16], dtype=torch.int32)
    layer._lay_out()
    check(layer, kernel, torch.float32)


@pytest.mark.parametrize("kernel", DECODE | SPLIT)
def test_matrix_loads_have_no_bank_conflicts(kernel: str) -> None:
    layer = Layer(TWO_PARTS, 8, 128)
    layer.run(kernel, torch.bfloat16)
    assert layer.conflicts == 0
