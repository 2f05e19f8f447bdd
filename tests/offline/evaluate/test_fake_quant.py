"""The fake-quantized layers against the executable specification."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from offline.evaluate.fake_quant import FakeQuantCache, FakeQuantLinear, attach_cache, fake_quant_attention
from offline.quantize.groupwise import groupwise
from offline.quantize.lowrank import LowRank
from offline.quantize.mixed import QuantizedLinear, quantize_linear
from resq_vllm import reference
from resq_vllm.formats.kv_layout import KVLayout
from resq_vllm.formats.metadata import LinearSite
from resq_vllm.formats.plan import linear_plan
from tests.offline.pack.tiny_checkpoint import orthogonal

SITES = {
    "part": LinearSite(low=84, high=12),
    "token": LinearSite(low=84, high=12, act_low_bits=8, scales="token", order="heads"),
    "head": LinearSite(low=84, high=12, scales="head", order="heads"),
    "block": LinearSite(low=96, high=0, scales="block", hadamard_groups=8),
    "uniform 8": LinearSite(low=96, high=0, weight_low_bits=8, act_low_bits=8),
}


@pytest.mark.parametrize("site", SITES.values(), ids=SITES)
@pytest.mark.parametrize("with_bias", [True, False])
def test_linear_equals_the_reference(site: LinearSite, with_bias: bool) -> None:
    torch.manual_seed(0)
    plan = linear_plan(site, 96, 16)
    quantized = quantize_linear(torch.randn(40, 96), None, plan, site.weight_low_bits)
    bias = torch.randn(40) if with_bias else None
    x = 3 * torch.randn(2, 7, 96)
    found = FakeQuantLinear(quantized, bias)(x)
    q = quantized
    expected = reference.linear(x.flatten(0, 1), q.low, q.high, q.low_scale, q.high_scale, plan, bias)
    torch.testing.assert_close(found.flatten(0, 1), expected, rtol=1e-4, atol=1e-4)
    assert (FakeQuantLinear(quantized, bias)(x.bfloat16())).dtype == torch.bfloat16


@pytest.mark.parametrize("scales", ["token", "block"])
@pytest.mark.parametrize("rank", [0, 5])
def test_weight_groups_and_correction_equal_the_reference(scales: str, rank: int) -> None:
    torch.manual_seed(1)
    groups = {"scale_groups": 4} if scales == "block" else {}
    fields = {"low": 96, "high": 0, "act_low_bits": 8, "scales": scales, "weight_group": 24, "low_rank": rank}
    plan = linear_plan(LinearSite.model_validate(fields | groups), 96, 16)
    rounded = groupwise(torch.randn(40, 96), 24)
    correction = LowRank(torch.randn(96, rank), torch.randn(rank, 40)) if rank else None
    none, zero = torch.empty(40, 0, dtype=torch.int8), torch.zeros(40)
    quantized = QuantizedLinear(rounded.codes, none, rounded.scale, zero, plan, correction=correction)
    x, bias = torch.randn(3, 7, 96), torch.randn(40)
    expected = reference.linear(x.flatten(0, 1), rounded.codes, none, rounded.scale, zero, plan, bias)
    if correction is not None:
        expected = expected + x.flatten(0, 1) @ correction.a @ correction.b
    found = FakeQuantLinear(quantized, bias)(x)
    torch.testing.assert_close(found.flatten(0, 1), expected, rtol=1e-4, atol=1e-4)


def packed_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: KVLayout,
    rotation: torch.Tensor | None,
    window: int,
) -> torch.Tensor:
    """The specification: write one sequence [T, heads, hd] into pages of 16 tokens and attend over them."""
    tokens = len(k)
    blocks = -(-tokens // 16)
    cache = torch.zeros(blocks, k.shape[1], 16, layout.bytes_per_token, dtype=torch.uint8)
    reference.kv_write(k, v, cache, torch.arange(tokens), rotation, layout)
    table, start = torch.arange(blocks, dtype=torch.int32)[None], torch.tensor([0, len(q)], dtype=torch.int32)
    lengths = torch.tensor([tokens], dtype=torch.int32)
    return reference.attention(q, cache, table, lengths, start, rotation, 0.25, layout, window)


@pytest.mark.parametrize("layout", [KVLayout(16, 2), KVLayout(16, 0), KVLayout(16, 4, 8)], ids=["4/8", "4", "8"])
@pytest.mark.parametrize("window", [None, 5, 100])
@pytest.mark.parametrize("queries", [37, 1, 6], ids=["prefill", "decode", "chunk"])
def test_attention_equals_the_packed_cache(layout: KVLayout, window: int | None, queries: int) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(37, 4, 16), 2 * torch.randn(37, 2, 16), torch.randn(37, 2, 16)
    rotation, module = orthogonal(16, 0), nn.Module()
    attach_cache(module, FakeQuantCache(layout, rotation))
    last = q[-queries:]
    query, key, value = (t.transpose(0, 1)[None] for t in (last, k, v))
    found, weights = fake_quant_attention(module, query, key, value, None, scaling=0.25, sliding_window=window)
    expected = packed_attention(last, k, v, layout, rotation, -1 if window is None else window)
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-5)
    assert weights is None


def test_attention_without_packed_cache_is_exact() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 9, 16), torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9, 16)
    module = nn.Module()
    attach_cache(module, FakeQuantCache(None, None))
    found, _ = fake_quant_attention(module, q, k, v, None, scaling=0.25)
    expected = nn.functional.scaled_dot_product_attention(
        q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), is_causal=True, scale=0.25
    )
    torch.testing.assert_close(found.transpose(1, 2), expected)


def test_padding_on_the_right_changes_nothing() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 9, 16), torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9, 16)
    module = nn.Module()
    attach_cache(module, FakeQuantCache(KVLayout(16, 2), orthogonal(16, 0)))
    short, _ = fake_quant_attention(module, q[:, :, :6], k[:, :, :6], v[:, :, :6], None, scaling=0.25)
    long, _ = fake_quant_attention(module, q, k, v, None, scaling=0.25)
    torch.testing.assert_close(long[:, :6], short)
