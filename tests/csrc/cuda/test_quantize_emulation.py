"""The quantize kernels' own source, thread by thread on the host, against the reference: every bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resq_vllm import reference
from resq_vllm.formats.activations import ActivationLayout
from resq_vllm.formats.plan import LinearPlan, Segment
from tests.csrc.cuda.quantize_support import aligned_copy, plans, run_quantize

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
THREADS = st.sampled_from([32, 64, 160])


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _expect(result: tuple[torch.Tensor, ...], x: torch.Tensor, plan: LinearPlan, nibbles: bool) -> None:
    codes, scale, zero = reference.quantize_activation(x, plan)
    assert torch.equal(result[1], scale)
    assert torch.equal(result[2], zero)
    assert torch.equal(result[0], ActivationLayout(plan, nibbles).pack(codes))


@settings(max_examples=60, deadline=None)
@given(plans(), st.integers(1, 3), st.sampled_from(DTYPES), st.booleans(), THREADS, st.integers(0, 2**31 - 1))
def test_any_plan(plan: LinearPlan, rows: int, dtype: torch.dtype, nibbles: bool, threads: int, seed: int) -> None:
    x = (torch.randn(rows, plan.columns, generator=_generator(seed)) * 3).to(dtype)
    _expect(run_quantize(x, plan, nibbles=nibbles, threads=threads, seed=seed), x, plan, nibbles)


@settings(max_examples=40, deadline=None)
@given(plans(), st.sampled_from(DTYPES), st.integers(0, 2**31 - 1))
def test_codes_in_column_order(plan: LinearPlan, dtype: torch.dtype, seed: int) -> None:
    x = torch.randn(2, plan.columns, generator=_generator(seed)).to(dtype)
    codes, scale, zero = run_quantize(x, plan, column_order=True, seed=seed)
    expected = reference.quantize_activation(x, plan)
    assert torch.equal(codes, expected[0])
    assert torch.equal(scale, expected[1])
    assert torch.equal(zero, expected[2])


@settings(max_examples=60, deadline=None)
@given(plans(hadamard=True), st.sampled_from(DTYPES), st.booleans(), THREADS, st.integers(0, 2**31 - 1))
def test_hadamard_of_a_power_of_two_is_exact(
    plan: LinearPlan, dtype: torch.dtype, nibbles: bool, threads: int, seed: int
) -> None:
    x = torch.randn(2, plan.columns, generator=_generator(seed)).to(dtype)
    result = run_quantize(x, plan, nibbles=nibbles, threads=threads, seed=seed)
    if plan.hadamard_k == 1:
        _expect(result, x, plan, nibbles)
        return
    # torch leaves the order of the dense factor's sums open: a code may fall on the other side of a rounding boundary.
    codes, scale, zero = reference.quantize_activation(x, plan)
    torch.testing.assert_close(result[1], scale, rtol=2e-6, atol=0)
    layout = ActivationLayout(plan, nibbles)
    assert (layout.unpack(result[0]).int() - codes.int()).abs().max() <= 1
    assert (result[2] - zero).abs().max() <= 1
    assert torch.equal(layout.pack(layout.unpack(result[0])), result[0]), "padding is 0"


@pytest.mark.parametrize("power", [8, 9, 10, 11, 12, 13])
def test_passes_through_shared_memory(power: int) -> None:
    plan = LinearPlan((Segment(2**power, 0, 0),), (4,), hadamard_groups=1)
    x = torch.randn(1, plan.columns, generator=_generator(power))
    _expect(run_quantize(x, plan, threads=128), x, plan, False)


@settings(max_examples=30, deadline=None)
@given(plans(), st.sampled_from(DTYPES), st.booleans(), THREADS, st.integers(0, 2**31 - 1))
def test_norm(plan: LinearPlan, dtype: torch.dtype, add: bool, threads: int, seed: int) -> None:
    g = _generator(seed)
    x, residual = (torch.randn(2, plan.columns, generator=g).to(dtype) for _ in range(2))
    weight = aligned_copy((1 + torch.randn(plan.columns, generator=g) / 4).to(dtype))
    kept = aligned_copy(residual) if add else None
    result = run_quantize(x, plan, threads=threads, seed=seed, weight=weight, residual=kept, epsilon=1e-5)
    normed, total = reference.rms_norm(x, residual if add else None, weight, 1e-5)
    if kept is not None:
        assert torch.equal(kept, total)
    codes, scale, _ = reference.quantize_activation(normed, plan)
    # The mean square is a sum in another order.
    close = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(result[1], scale, rtol=close, atol=1e-7)
    unpacked = ActivationLayout(plan).unpack(result[0])
    assert (unpacked.int() - codes.int()).abs().max() <= (1 if dtype == torch.float32 else 3)
    assert torch.equal(ActivationLayout(plan).pack(unpacked), result[0])


@settings(max_examples=30, deadline=None)
@given(plans(hadamard=True), st.sampled_from(DTYPES), THREADS, st.integers(0, 2**31 - 1))
def test_silu_mul(plan: LinearPlan, dtype: torch.dtype, threads: int, seed: int) -> None:
    gate_up = torch.randn(2, 2 * plan.columns, generator=_generator(seed)).to(dtype)
    result = run_quantize(gate_up, plan, threads=threads, seed=seed, silu_mul=True)
    codes, scale, _ = reference.quantize_activation(reference.silu_mul(gate_up), plan)
    close = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(result[1], scale, rtol=close, atol=1e-7)
    assert (ActivationLayout(plan).unpack(result[0]).int() - codes.int()).abs().max() <= (
        1 if dtype == torch.float32 else 3
    )


@pytest.mark.parametrize(
    "row",
    [
        [0.0] * 24,
        [-0.0, 0.0] * 12,
        [1e-40, -3e-41, 2e-39] * 8,
        [3e38, -1e30, 5.0] * 8,
        [1.0, 2.5, 7.5] * 8,
        [-5.0, -3.0, -1e-3] * 8,
        [1e-30, 2e-30, 3.5e-30] * 8,
    ],
    ids=["zeros", "signed zeros", "subnormals", "huge", "ties", "negative", "tiny"],
)
@pytest.mark.parametrize("bits", [4, 8])
def test_edges(row: list[float], bits: int) -> None:
    x = torch.tensor([row])
    plan = LinearPlan((Segment(len(row), 0, 0),), (bits,))
    _expect(run_quantize(x, plan, threads=32), x, plan, False)


def test_more_stretches_than_the_tables_hold() -> None:
    plan = LinearPlan((Segment(3, 0, 0), Segment(1, 1, 0)) * 200, (8,))
    with pytest.raises(RuntimeError, match="at most 256 stretches of columns, but this layer's have 400"):
        run_quantize(torch.zeros(1, 800), plan)
