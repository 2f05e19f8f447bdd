"""Quantized linears to checkpoint tensors and back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offline.pack.tensors import linear_from_tensors, linear_specs, linear_tensors
from offline.quantize.mixed import QuantizedLinear
from resq_vllm.errors import ResQError
from resq_vllm.formats.metadata import LinearSite
from resq_vllm.formats.plan import LOW, LinearPlan, Segment, linear_plan


@st.composite
def sites(draw: st.DrawFn) -> LinearSite:
    low, high = 2 * draw(st.integers(0, 12)), 2 * draw(st.integers(0, 4))
    if low + high == 0:
        low = 2
    return LinearSite(low=low, high=high, weight_low_bits=draw(st.sampled_from([4, 8])))


def random_linear(site: LinearSite, rows: int, seed: int) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(seed)
    largest = 1 << (site.weight_low_bits - 1)
    low = torch.randint(-largest, largest, (rows, site.low), dtype=torch.int8, generator=generator)
    high = torch.randint(-128, 128, (rows, site.high), dtype=torch.int8, generator=generator)
    low_scale, high_scale = (torch.rand(rows, generator=generator) * bool(n) for n in (site.low, site.high))
    plan = linear_plan(site, site.low + site.high, 8)
    return QuantizedLinear(low, high, low_scale, high_scale, plan, site.weight_low_bits, 8)


@given(site=sites(), rows=st.integers(1, 5), seed=st.integers(0, 2**31))
def test_round_trip(site: LinearSite, rows: int, seed: int) -> None:
    linear = random_linear(site, rows, seed)
    tensors = linear_tensors(linear, "m")
    back = linear_from_tensors(tensors.__getitem__, "m", rows, site, linear.plan)
    for field in ("low", "high", "low_scale", "high_scale"):
        assert torch.equal(getattr(back, field), getattr(linear, field)), field
    assert (back.low_bits, back.high_bits, back.plan) == (linear.low_bits, 8, linear.plan)


@given(site=sites(), rows=st.integers(1, 5), seed=st.integers(0, 2**31))
def test_specs_describe_the_tensors(site: LinearSite, rows: int, seed: int) -> None:
    tensors = linear_tensors(random_linear(site, rows, seed), "m")
    specs = linear_specs("m", rows, site)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == {
        name: (spec.dtype, spec.shape) for name, spec in specs.items()
    }


def test_nibbles_are_low_first_and_twos_complement() -> None:
    plan = LinearPlan((Segment(2, LOW, 0),), (4,))
    linear = QuantizedLinear(
        torch.tensor([[3, -2]], dtype=torch.int8),
        torch.empty(1, 0, dtype=torch.int8),
        torch.ones(1),
        torch.zeros(1),
        plan,
    )
    assert linear_tensors(linear, "m")["m.weight_low"].tolist() == [[0xE3]]


def test_bias_is_stored_in_its_own_dtype() -> None:
    linear = random_linear(LinearSite(low=4, high=2), 3, 0)
    assert linear_tensors(linear, "m", torch.ones(3, dtype=torch.bfloat16))["m.bias"].dtype == torch.bfloat16


def test_odd_number_of_4_bit_columns_is_refused() -> None:
    linear = random_linear(LinearSite(low=3, high=2), 3, 0)
    with pytest.raises(ResQError, match="q_proj: 3 4-bit columns do not pair up"):
        linear_tensors(linear, "q_proj")
