"""The kernel of contiguous rows, on the host: every bit is the reference's, and that of the kernel of all rows."""

from __future__ import annotations

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resq_vllm import reference
from resq_vllm.formats.activations import ActivationLayout
from resq_vllm.formats.plan import LinearPlan, Segment
from tests.csrc.cuda.quantize_support import aligned_copy, emulation, run_quantize

DTYPES = [torch.float16, torch.bfloat16]
HELD = st.sampled_from([1, 4])
SEEDS = st.integers(0, 2**31 - 1)


@st.composite
def contiguous_plans(draw: st.DrawFn) -> LinearPlan:
    """[low | high], [high | low] or one part, of whole vectors, with groups of their own or one for both."""
    low = draw(st.one_of(st.sampled_from([128, 256, 1024]), st.integers(1, 150).map(lambda v: 8 * v)))
    high = draw(st.one_of(st.sampled_from([128, 256]), st.integers(1, 40).map(lambda v: 8 * v)))
    low_bits = draw(st.sampled_from([4, 8]))
    kind = draw(st.sampled_from(["both", "both", "swapped", "one group", "low", "high"]))
    if kind == "low":
        return LinearPlan((Segment(low, 0, 0),), (low_bits,))
    if kind == "high":
        return LinearPlan((Segment(high, 1, 0),), (8,))
    if kind == "swapped":
        return LinearPlan((Segment(high, 1, 0), Segment(low, 0, 1)), (8, low_bits))
    if kind == "one group":
        return LinearPlan((Segment(low, 0, 0), Segment(high, 1, 0)), (low_bits,))
    return LinearPlan((Segment(low, 0, 0), Segment(high, 1, 1)), (low_bits, 8))


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _values(kind: str, rows: int, columns: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    g, info = _generator(seed), torch.finfo(dtype)
    x = torch.randn(rows, columns, generator=g)
    if kind == "ties":  # often ± the same extrema: the zero point is then a half, and codes go beyond the last
        return torch.randint(-30, 31, x.shape, generator=g).to(dtype) / 4
    if kind == "one sign":
        x = x.abs() * (1 - 2 * torch.randint(0, 2, (rows, 1), generator=g))
    if kind == "zeros":
        x = torch.where(torch.rand(x.shape, generator=g) < 0.5, x * 0, torch.zeros(()))  # of either sign
    if kind == "tiny":
        x = x * info.tiny
    if kind == "subnormal":
        x = torch.randint(-127, 128, x.shape, generator=g) * (info.tiny * info.eps)
    if kind == "huge":
        x = (x * info.max / 3).clamp(info.min, info.max)
    return x.to(dtype)


VALUES = st.sampled_from(["normal", "ties", "one sign", "zeros", "tiny", "subnormal", "huge"])


def _with_specials(x: torch.Tensor, seed: int) -> torch.Tensor:
    """NaN in the first row, infinity in the second, all of them in the third; the others as they are."""
    columns = torch.randint(0, x.shape[1], (3,), generator=_generator(seed))
    x[0, columns[0]] = float("nan")
    x[1, columns[1]] = float("inf")
    x[2, columns] = torch.tensor([float("-inf"), float("inf"), float("nan")], dtype=x.dtype)
    return x


@settings(max_examples=120, deadline=None)
@given(contiguous_plans(), st.integers(1, 3), st.sampled_from(DTYPES), st.booleans(), HELD, VALUES, SEEDS)
def test_every_bit_is_the_reference_s(
    plan: LinearPlan, rows: int, dtype: torch.dtype, nibbles: bool, held: int, kind: str, seed: int
) -> None:
    x = _values(kind, rows, plan.columns, dtype, seed)
    codes, scale, zero = run_quantize(x, plan, nibbles=nibbles, held=held, seed=seed)
    expected = reference.quantize_activation(x, plan)
    assert torch.equal(scale, expected[1])
    assert torch.equal(zero, expected[2])
    assert torch.equal(codes, ActivationLayout(plan, nibbles).pack(expected[0]))


@settings(max_examples=40, deadline=None)
@given(contiguous_plans(), st.sampled_from(DTYPES), HELD, VALUES, SEEDS)
def test_codes_in_column_order(plan: LinearPlan, dtype: torch.dtype, held: int, kind: str, seed: int) -> None:
    x = _values(kind, 2, plan.columns, dtype, seed)
    result = run_quantize(x, plan, column_order=True, held=held, seed=seed)
    for ours, expected in zip(result, reference.quantize_activation(x, plan), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("held", [1, 4])
def test_a_code_beyond_the_last_is_clamped(held: int, bits: int, dtype: torch.dtype) -> None:
    plan = LinearPlan((Segment(64, 0, 0),), (bits,))
    x = torch.linspace(-(2**bits - 1) / 8, (2**bits - 1) / 8, 64)[None].to(dtype)  # a scale of 1/4
    codes, scale, zero = reference.quantize_activation(x, plan)
    assert ((x.float() / scale).round() + zero).max() == 2**bits, "the row is one that clamps"
    ours = run_quantize(x, plan, held=held, column_order=True)
    assert torch.equal(ours[0], codes)
    assert torch.equal(ours[2], zero)


@settings(max_examples=60, deadline=None)
@given(contiguous_plans(), st.sampled_from(DTYPES), st.booleans(), HELD, VALUES, SEEDS)
def test_rows_with_nan_and_infinity(
    plan: LinearPlan, dtype: torch.dtype, nibbles: bool, held: int, kind: str, seed: int
) -> None:
    x = _with_specials(_values(kind, 5, plan.columns, dtype, seed), seed)
    x[3, :] = float("nan")
    ours = run_quantize(x, plan, nibbles=nibbles, held=held, seed=seed)
    for mine, theirs in zip(ours, run_quantize(x, plan, nibbles=nibbles, seed=seed), strict=True):
        assert torch.equal(mine, theirs)


@settings(max_examples=120, deadline=None)
@given(
    contiguous_plans(),
    st.sampled_from(DTYPES),
    st.booleans(),
    HELD,
    VALUES,
    st.sampled_from([1.0, 1e-3, 1e-20, 0.0]),
    st.booleans(),
    SEEDS,
)
def test_norm_is_bit_for_bit_the_other_kernel_s(
    plan: LinearPlan, dtype: torch.dtype, add: bool, held: int, kind: str, size: float, special: bool, seed: int
) -> None:
    x, residual = (_values(kind, 4, plan.columns, dtype, seed + i) for i in range(2))
    weight = torch.randn(plan.columns, generator=_generator(seed + 2)) * size
    if special:
        (residual if add and seed % 2 else x).copy_(_with_specials(x.clone(), seed))
        weight[seed % plan.columns] = float("inf") if seed % 3 else float("nan")
    weight = aligned_copy(weight.to(dtype))
    # As many threads as the other kernel has: then the squares are added in the same order.
    threads = emulation().resq_contiguous_threads(ctypes.c_int64(plan.columns // 8), ctypes.c_int64(held))
    results = []
    for which in (held, 0):
        kept = aligned_copy(residual) if add else None
        result = run_quantize(
            x, plan, held=which, threads=threads, weight=weight, residual=kept, epsilon=1e-5, seed=seed
        )
        results.append((*result, *([] if kept is None else [kept.view(torch.int16)])))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@settings(max_examples=60, deadline=None)
@given(contiguous_plans(), st.sampled_from(DTYPES), st.booleans(), HELD, VALUES, SEEDS)
def test_norm(plan: LinearPlan, dtype: torch.dtype, add: bool, held: int, kind: str, seed: int) -> None:
    x, residual = (_values(kind, 2, plan.columns, dtype, seed + i) for i in range(2))
    weight = aligned_copy((1 + torch.randn(plan.columns, generator=_generator(seed)) / 4).to(dtype))
    kept = aligned_copy(residual) if add else None
    result = run_quantize(x, plan, held=held, seed=seed, weight=weight, residual=kept, epsilon=1e-5)
    normed, total = reference.rms_norm(x, residual if add else None, weight, 1e-5)
    if kept is not None:
        assert torch.equal(kept.view(torch.int16), total.view(torch.int16))
    if not normed.isfinite().all():  # the squares' sum is beyond float32
        return
    codes, scale, _ = reference.quantize_activation(normed, plan)
    # The mean square is a sum in another order.
    torch.testing.assert_close(result[1], scale, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)
    unpacked = ActivationLayout(plan).unpack(result[0])
    assert (unpacked.int() - codes.int()).abs().max() <= 3
    assert torch.equal(ActivationLayout(plan).pack(unpacked), result[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("held", [1, 4])
def test_norm_whose_sum_has_no_order(dtype: torch.dtype, add: bool, held: int) -> None:
    # Squares whose sums are exact in any order: then every bit of the norm, and of the codes, is the reference's.
    plan = LinearPlan((Segment(896, 0, 0), Segment(128, 1, 1)), (4, 8))
    g = _generator(held)
    x, residual = (torch.randint(-12, 13, (3, 1024), generator=g).to(dtype) for _ in range(2))
    weight = aligned_copy((1 + torch.randn(1024, generator=g) / 4).to(dtype))
    kept = aligned_copy(residual) if add else None
    codes, scale, zero = run_quantize(x, plan, held=held, weight=weight, residual=kept, epsilon=1e-5)
    normed, _ = reference.rms_norm(x, residual if add else None, weight, 1e-5)
    expected = reference.quantize_activation(normed, plan)
    assert torch.equal(scale, expected[1])
    assert torch.equal(zero, expected[2])
    assert torch.equal(codes, ActivationLayout(plan).pack(expected[0]))
