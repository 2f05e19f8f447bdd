"""quantize_activation, pack_weight and linear against the reference: equal bit for bit, on every instruction set."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resq_vllm import ops, reference
from resq_vllm.formats.metadata import LinearSite
from resq_vllm.formats.plan import LinearPlan, Segment, linear_plan
from tests.csrc.support import ISAS, READINGS, Weights, assert_identical, generator, plan_arguments, running

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _plan(site: LinearSite, head_dim: int = 64) -> tuple[LinearPlan, int]:
    return linear_plan(site, site.low + site.high, head_dim), site.weight_low_bits


# Every kind of plan: what shares a scale, where the high columns are, and widths that need padding.
PLANS: dict[str, tuple[LinearPlan, int]] = {
    "split": _plan(LinearSite(low=224, high=32)),
    "split_odd_widths": _plan(LinearSite(low=70, high=11)),
    "split_8bit_weights": _plan(LinearSite(low=98, high=14, weight_low_bits=8)),
    "o_proj_token8": _plan(LinearSite(low=224, high=32, scales="token", act_low_bits=8, order="heads")),
    "o_proj_part": _plan(LinearSite(low=224, high=32, scales="part", order="heads")),
    "o_proj_head128": _plan(LinearSite(low=224, high=32, scales="head", order="heads"), 128),
    "o_proj_head32": _plan(LinearSite(low=84, high=12, scales="head", order="heads"), 32),
    "down_blocks": _plan(LinearSite(low=512, high=0, scales="block", hadamard_groups=8)),
    "down_blocks_8bit_activations": _plan(
        LinearSite(low=512, high=0, scales="block", act_low_bits=8, hadamard_groups=8)
    ),
    "down_blocks_with_high": _plan(LinearSite(low=96, high=32, scales="block", hadamard_groups=4)),
    "down_one_scale": _plan(LinearSite(low=256, high=0, scales="token", hadamard_groups=2)),
    "down_blocks_of_two_hadamards": _plan(
        LinearSite(low=384, high=128, scales="block", scale_groups=4, hadamard_groups=16)
    ),
    "blocks_without_hadamard": _plan(LinearSite(low=96, high=24, scales="block", scale_groups=3)),
    "o_proj_heads_in_blocks": _plan(LinearSite(low=224, high=32, scales="block", scale_groups=2, order="heads")),
    "weight_groups": _plan(LinearSite(low=256, high=0, scales="token", act_low_bits=8, weight_group=64)),
    "weight_groups_odd": _plan(LinearSite(low=99, high=11, act_low_bits=8, weight_low_bits=8, weight_group=33)),
    "weight_groups_of_one": _plan(LinearSite(low=8, high=2, weight_group=1)),
    "weight_groups_over_heads": _plan(LinearSite(low=224, high=32, scales="head", order="heads", weight_group=32)),
    "weight_group_a_block": _plan(
        LinearSite(low=256, high=0, scales="block", scale_groups=4, hadamard_groups=8, weight_group=64)
    ),
    "down_tiny_blocks": _plan(LinearSite(low=24, high=0, scales="block", hadamard_groups=12)),
    "all_high": _plan(LinearSite(low=0, high=36)),
    "one_column": (LinearPlan((Segment(1, 1, 0),), (8,)), 4),
}


def _input(rows: int, columns: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    g = generator(seed)
    x = torch.randn(rows, columns, generator=g)
    x *= torch.logspace(-3, 2, rows)[torch.randperm(rows, generator=g)][:, None]  # tokens of unlike magnitude
    return x.to(dtype)


def _check(weights: Weights, x: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    plan = weights.plan
    codes, scale, zero = reference.quantize_activation(x, plan)
    expected = weights.reference(x, bias)
    for isa in ISAS + READINGS:
        with running(isa):
            if isa in ISAS:
                assert_identical(ops.quantize_activation(x, *plan_arguments(plan)), (codes, scale, zero), isa)
            assert_identical(weights.apply(x, bias), expected, isa)


@pytest.mark.parametrize("name", PLANS)
@settings(max_examples=12, deadline=None)
@given(
    rows=st.integers(1, 40),
    outputs=st.integers(1, 200),
    dtype=st.sampled_from(DTYPES),
    with_bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_equals_reference(name: str, rows: int, outputs: int, dtype: torch.dtype, with_bias: bool, seed: int) -> None:
    plan, low_bits = PLANS[name]
    bias = torch.randn(outputs, generator=generator(seed)).to(dtype) if with_bias else None
    _check(Weights(plan, outputs, low_bits, seed), _input(rows, plan.columns, dtype, seed), bias)


@settings(max_examples=15, deadline=None)
@given(low=st.integers(0, 90), high=st.integers(0, 60), outputs=st.integers(1, 90), seed=st.integers(0, 2**31))
def test_any_width(low: int, high: int, outputs: int, seed: int) -> None:
    segments = [s for s in (Segment(2 * low, 0, 0), Segment(high, 1, 1 if low else 0)) if s.columns]
    if not segments:
        segments = [Segment(2, 0, 0)]
    plan = LinearPlan(tuple(segments), tuple([4, 8][-len(segments) :]))
    _check(Weights(plan, outputs, 4, seed), _input(5, plan.columns, torch.float32, seed))


@settings(max_examples=25, deadline=None)
@given(
    group=st.integers(1, 24),
    groups=st.integers(1, 6),
    heads=st.sampled_from([1, 2, 4]),
    high=st.integers(0, 12),
    low_bits=st.sampled_from([4, 8]),
    shared=st.booleans(),
    outputs=st.integers(1, 90),
    seed=st.integers(0, 2**31),
)
def test_any_weight_group(
    group: int, groups: int, heads: int, high: int, low_bits: int, shared: bool, outputs: int, seed: int
) -> None:
    """Weight groups end wherever they end: inside a head, at its edge, over several."""
    low = 2 * group * groups
    segments = [
        s
        for h in range(heads)
        for s in (Segment(low, 0, 0 if shared else 2 * h), Segment(high, 1, 0 if shared else 2 * h + 1))
        if s.columns
    ]
    used = sorted({s.group for s in segments})
    segments = [Segment(s.columns, s.part, used.index(s.group)) for s in segments]
    plan = LinearPlan(tuple(segments), (8,) * len(used), weight_group=2 * group * (heads if seed % 2 else 1))
    _check(Weights(plan, outputs, low_bits, seed), _input(5, plan.columns, torch.float32, seed))


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
@pytest.mark.parametrize("outputs", [64, 128, 191, 256, 300, 449, 640])
def test_superblocks_side_by_side(rows: int, outputs: int) -> None:
    """Few rows read up to four superblocks at once, and what is left of them by twos and one by one."""
    for name in ("split", "down_blocks_with_high"):
        plan, low_bits = PLANS[name]
        bias = torch.randn(outputs, generator=generator(rows))
        _check(Weights(plan, outputs, low_bits, rows), _input(rows, plan.columns, torch.float32, outputs), bias)


@pytest.mark.parametrize("rows", [255, 256, 257, 700])
def test_more_rows_than_a_panel(rows: int) -> None:
    plan, low_bits = PLANS["down_blocks"]
    _check(Weights(plan, 65, low_bits, 0), _input(rows, plan.columns, torch.bfloat16, 0))


@pytest.mark.parametrize("rows", [1, 6, 7, 16, 17, 33, 64, 100])
@pytest.mark.parametrize(("low", "high"), [(1792, 256), (1114, 163)])
def test_long_runs(low: int, high: int, rows: int) -> None:
    """Runs longer than the stretch of columns that stays in a cache; ends inside a tile of rows, columns or outputs."""
    plan = LinearPlan((Segment(low, 0, 0), Segment(high, 1, 1)), (4, 8))
    _check(Weights(plan, 72, 4, rows), _input(rows, plan.columns, torch.bfloat16, rows))


@pytest.mark.parametrize("outputs", [64, 400])
def test_wide_layers_a_part_of_the_columns_at_a_time(outputs: int) -> None:
    """More codes than fit the L2 cache: sums of several superblocks wait, as a run's integers or the layer's floats."""
    down = LinearSite(low=7168, high=1024, scales="block", scale_groups=8, hadamard_groups=64)
    for site in (down, LinearSite(low=6000, high=852)):
        plan, low_bits = _plan(site)
        _check(Weights(plan, outputs, low_bits, 2), _input(210, plan.columns, torch.bfloat16, outputs))


def test_more_plans_than_are_kept() -> None:
    for _ in range(2):
        for columns in range(2, 150, 2):
            plan = LinearPlan((Segment(columns, 0, 0),), (4,))
            x = _input(2, columns, torch.float32, columns)
            assert_identical(
                ops.quantize_activation(x, *plan_arguments(plan)), reference.quantize_activation(x, plan), ops.isa()
            )


@pytest.mark.parametrize("size", [1e-36, 1e-30, 1e-25, 1e25, 1e30])
def test_magnitudes_at_the_ends_of_float32(size: float) -> None:
    """Scales where a product in place of the division would underflow or overflow."""
    for name in ("split", "down_blocks", "o_proj_part"):
        plan, low_bits = PLANS[name]
        _check(Weights(plan, 20, low_bits, 3), torch.randn(9, plan.columns, generator=generator(3)) * size)


def test_ties_of_the_quotient() -> None:
    """Values whose quotients lie at or next to halves, where one bit of the division decides the code."""
    for bits in (4, 8):
        plan = LinearPlan((Segment(2048, 0, 0),), (bits,))
        top = torch.rand(64, 1, generator=generator(bits)) + 0.5
        steps = torch.arange(2048) % (2 * 2**bits - 1)
        x = top / (2**bits - 1) * steps / 2
        x[:, 1024:] = torch.nextafter(x[:, 1024:], torch.tensor(torch.inf))
        expected = reference.quantize_activation(x, plan)
        for isa in ISAS:
            with running(isa):
                assert_identical(ops.quantize_activation(x, *plan_arguments(plan)), expected, isa)


def test_extreme_codes_stay_exact() -> None:
    """The largest products of every width: any saturating instruction would show."""
    for x_row, weight in ((1.0, 127), (1.0, -128), (-1.0, -128)):
        plan = LinearPlan((Segment(512, 0, 0), Segment(512, 1, 0)), (8,))
        weights = Weights(plan, 64, 4, 0)
        low, high = torch.full_like(weights.low, max(-8, min(7, weight))), torch.full_like(weights.high, weight)
        weights.low, weights.high = low, high
        stored = low.to(torch.uint8) & 15
        weights.packed, weights.sums = ops.pack_weight(
            stored[:, ::2] | stored[:, 1::2] << 4, high, 4, 64, plan.flat_segments()
        )
        x = torch.full((7, 1024), x_row)
        x[:, ::3] = 0.0
        _check(weights, x)


@pytest.mark.parametrize("value", [0.0, 3.0, -3.0, 1e-42, 3e38])
def test_constant_rows(value: float) -> None:
    for name in ("split", "o_proj_head128", "down_one_scale"):
        plan, low_bits = PLANS[name]
        x = torch.full((3, plan.columns), value)
        if plan.hadamard_groups and value > 1e38:
            continue  # the butterflies overflow float32
        _check(Weights(plan, 70, low_bits, 1), x)


def test_rounds_half_to_even() -> None:
    plan = LinearPlan((Segment(6, 0, 0),), (4,))
    for isa in ISAS:
        with running(isa):
            codes, _, _ = ops.quantize_activation(torch.tensor([[0.0, 0.5, 1.5, 2.5, 3.5, 15]]), *plan_arguments(plan))
        assert codes.tolist() == [[0, 0, 2, 2, 4, 15]]


def test_strided_rows_and_leading_dims() -> None:
    plan, low_bits = PLANS["split"]
    weights = Weights(plan, 40, low_bits, 2)
    wide = torch.randn(6, 2 * plan.columns, generator=generator(3))
    x = wide[:, : plan.columns]
    expected = weights.reference(x)
    assert torch.equal(weights.apply(x), expected)
    assert torch.equal(weights.apply(x.reshape(2, 3, -1)), expected.reshape(2, 3, -1))
    assert torch.equal(weights.apply(x[0]), expected[0])
    assert torch.equal(weights.apply(x.T.contiguous().T), expected)


def test_no_rows() -> None:
    plan, low_bits = PLANS["split"]
    y = Weights(plan, 40, low_bits, 2).apply(torch.empty(0, plan.columns, dtype=torch.bfloat16))
    assert y.shape == (0, 40)
    codes, scale, zero = ops.quantize_activation(torch.empty(0, plan.columns), *plan_arguments(plan))
    assert codes.shape == (0, plan.columns)
    assert scale.shape == zero.shape == (0, 2)


def test_one_output() -> None:
    plan, low_bits = PLANS["o_proj_head128"]
    _check(Weights(plan, 1, low_bits, 2), _input(9, plan.columns, torch.float32, 4))


def test_result_does_not_depend_on_threads() -> None:
    plan, low_bits = PLANS["down_blocks"]
    weights = Weights(plan, 150, low_bits, 5)
    threads = torch.get_num_threads()
    for rows in (1, 2, 30):
        x = _input(rows, plan.columns, torch.float32, 6)
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(weights.apply(x))
        torch.set_num_threads(threads)
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("threads", [1, 128])
@pytest.mark.parametrize("rows", [1, 8, 40, 300])
def test_more_threads_than_cores(rows: int, threads: int) -> None:
    plan, low_bits = PLANS["down_blocks_with_high"]
    weights, x = Weights(plan, 330, low_bits, 7), _input(rows, plan.columns, torch.bfloat16, 8)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        _check(weights, x)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("outputs", [64, 96, 129])
def test_large_outputs(dtype: torch.dtype, outputs: int) -> None:
    """Outputs that do not fit the caches, in whole lines and not."""
    plan = LinearPlan((Segment(8, 0, 0),), (8,))
    _check(Weights(plan, outputs, 4, 9), _input(2**20 // outputs, plan.columns, dtype, 9))


@pytest.mark.parametrize("low", [1024, 1030, 2400])
def test_a_share_of_a_run_beside_whole_ones(low: int) -> None:
    """Tiles take shares of long runs and several short ones together; some sums leave what float32 holds exactly."""
    segments = (Segment(70, 0, 0), Segment(low, 1, 1), Segment(20, 0, 2), Segment(900, 0, 3), Segment(8, 1, 1))
    plan = LinearPlan(segments, (4, 8, 8, 4))
    for rows in (7, 33, 80):
        _check(Weights(plan, 100, 4, rows), _input(rows, plan.columns, torch.bfloat16, rows))


def test_inputs_of_any_layout() -> None:
    plan, low_bits = PLANS["split_odd_widths"]
    weights = Weights(plan, 75, low_bits, 2)
    wide = torch.randn(40, 3, plan.columns + 5, generator=generator(3)).bfloat16()
    for x in (wide[::3, 1, 2:-3], wide[:, :, 5:], wide.transpose(0, 1)[..., :-5], wide[:1, 0, 5:].expand(9, -1)):
        expected = weights.reference(x.reshape(-1, plan.columns)).reshape(*x.shape[:-1], 75)
        for isa in ISAS:
            with running(isa):
                assert_identical(weights.apply(x), expected, isa)
                assert_identical(weights.apply_planned(x), expected, isa)


def test_planned_is_the_same_op() -> None:
    for name, (plan, low_bits) in PLANS.items():
        weights, x = Weights(plan, 70, low_bits, 4), _input(9, plan.columns, torch.bfloat16, 5)
        bias = torch.randn(70, generator=generator(6)).bfloat16()
        assert_identical(weights.apply_planned(x, bias), weights.apply(x, bias), name)
        assert weights.apply_planned(x[:0]).shape == (0, 70)


def test_bad_plans_are_named() -> None:
    plan, low_bits = PLANS["split"]
    w, x = Weights(plan, 40, low_bits, 2), torch.randn(2, plan.columns)
    for message, words in {
        "plan must be int64": w.words.int(),
        "plan is not what plan_tensor makes": w.words[:2],
        "segments must be a list of": torch.cat([w.words[:2], torch.tensor([4]), w.words[3:]]),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            ops.linear_planned(x, w.packed, w.scales, w.sums, None, words)


def test_bad_arguments_are_named() -> None:
    plan, low_bits = PLANS["split"]
    w = Weights(plan, 40, low_bits, 2)
    x = torch.randn(2, plan.columns)
    arguments = plan_arguments(plan)
    for message, call in {
        r"x must have shape \[\.\.\., 256\], not \[2, 255\]": lambda: w.apply(x[:, 1:]),
        "x must be float32, float16 or bfloat16": lambda: w.apply(x.int()),
        "packed holds": lambda: ops.linear(x, w.packed[64:], w.scales, w.sums, None, 40, *arguments),
        r"bias must have shape \[40\]": lambda: w.apply(x, torch.zeros(41)),
        r"scales must have shape \[2, 40\]": lambda: ops.linear(
            x, w.packed, w.scales[:1], w.sums, None, 40, *arguments
        ),
        "weight_group = 3 does not divide 224 low columns": lambda: ops.linear(
            x, w.packed, w.scales, w.sums, None, 40, *arguments, 3
        ),
        "weight_group must not be negative": lambda: ops.pack_weight(None, w.high, 4, 40, [32, 1, 0], -1),
        r"scales must have shape \[8, 40\]": lambda: ops.linear(
            x, w.packed, w.scales, w.sums, None, 40, *arguments, 32
        ),
        "group_bits must be 4 or 8, not 3": lambda: ops.quantize_activation(x, arguments[0], [3, 8]),
        "activation group 1 has no entry": lambda: ops.quantize_activation(x, arguments[0], [4]),
        "low must be given exactly": lambda: ops.pack_weight(None, w.high, 4, 40, arguments[0]),
        r"high must have shape \[40, 32\]": lambda: ops.pack_weight(
            torch.zeros(40, 112, dtype=torch.uint8), w.high[:, 1:], 4, 40, arguments[0]
        ),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            call()
