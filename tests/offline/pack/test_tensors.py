"""Quantized linears to checkpoint tensors and back."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offline.pack.tensors import linear_from_tensors, linear_specs, linear_tensors
from offline.quantize.lowrank import LowRank
from offline.quantize.mixed import QuantizedLinear
from resq_vllm.errors import ResQError
from resq_vllm.formats.metadata import LinearSite
from resq_vllm.formats.plan import LOW, LinearPlan, Segment, linear_plan


@st.composite
def sites(draw: st.DrawFn) -> LinearSite:
    low, high = 2 * draw(st.integers(0, 12)), 2 * draw(st.integers(0, 4))
    if low + high == 0:
        low = 2
    group = draw(st.sampled_from([0, 2, low])) if low else 0
    rank = draw(st.sampled_from([0, 1, 3]))
    bits: Literal[4, 8] = draw(st.sampled_from([4, 8]))
    return LinearSite(low=low, high=high, weight_low_bits=bits, weight_group=group, low_rank=rank)


def random_linear(site: LinearSite, rows: int, seed: int) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(seed)
    largest = 1 << (site.weight_low_bits - 1)
    low = torch.randint(-largest, largest, (rows, site.low), dtype=torch.int8, generator=generator)
    high = torch.randint(-128, 128, (rows, site.high), dtype=torch.int8, generator=generator)
    groups = (rows, site.weight_groups) if site.weight_group else (rows,)
    low_scale = torch.rand(groups, generator=generator) * bool(site.low)
    high_scale = torch.rand(rows, generator=generator) * bool(site.high)
    columns = site.low + site.high
    plan = linear_plan(site, columns, 8)
    correction = None
    if site.low_rank:
        a = torch.randn(columns, site.low_rank, generator=generator)
        correction = LowRank(a, torch.randn(site.low_rank, rows, generator=generator)).to(torch.bfloat16)
    return QuantizedLinear(low, high, low_scale, high_scale, plan, site.weight_low_bits, 8, correction)


@given(site=sites(), rows=st.integers(1, 5), seed=st.integers(0, 2**31))
def test_round_trip(site: LinearSite, rows: int, seed: int) -> None:
    linear = random_linear(site, rows, seed)
    tensors = linear_tensors(linear, "m")
    back = linear_from_tensors(tensors.__getitem__, "m", rows, site, linear.plan)
    for field in ("low", "high", "low_scale", "high_scale"):
        assert torch.equal(getattr(back, field), getattr(linear, field)), field
    assert (back.low_bits, back.high_bits, back.plan) == (linear.low_bits, 8, linear.plan)
    assert torch.equal(back.dequantize(), linear.dequantize())
    assert (back.correction is None) == (linear.correction is None)


@given(site=sites(), rows=st.integers(1, 5), seed=st.integers(0, 2**31))
def test_specs_describe_the_tensors(site: LinearSite, rows: int, seed: int) -> None:
    tensors = linear_tensors(random_linear(site, rows, seed), "m")
    specs = linear_specs("m", rows, site)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == {
        name: (spec.dtype or torch.bfloat16, spec.shape) for name, spec in specs.items()
    }
    assert [name for name, spec in specs.items() if spec.dtype is None] == (
        ["m.low_rank_a", "m.low_rank_b"] if site.low_rank else []
    )


def test_weight_groups_and_correction_enter_the_dequantized_weight() -> None:
    site = LinearSite(low=4, high=0, weight_group=2, low_rank=1)
    codes = torch.tensor([[1, 2, 3, 4]], dtype=torch.int8)
    correction = LowRank(torch.tensor([[0.5], [0.0], [0.0], [-1.0]]), torch.tensor([[2.0]]))
    none = torch.empty(1, 0, dtype=torch.int8)
    scale = torch.tensor([[1.0, 10.0]])
    linear = QuantizedLinear(codes, none, scale, torch.zeros(1), linear_plan(site, 4, 4), correction=correction)
    assert linear.dequantize().tolist() == [[2.0, 2.0, 30.0, 38.0]]


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
