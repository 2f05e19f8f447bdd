"""The specification itself: identities that its ops must obey, on random shapes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resq_vllm import reference
from resq_vllm.formats.kv_layout import KVLayout
from resq_vllm.formats.metadata import LinearSite
from resq_vllm.formats.plan import linear_plan

SITES = {
    "split": (LinearSite(low=224, high=32), 256),
    "out_token8": (LinearSite(low=224, high=32, scales="token", act_low_bits=8, order="heads"), 128),
    "out_paper": (LinearSite(low=224, high=32, scales="head", order="heads"), 256),
    "down_blocks": (LinearSite(low=768, high=0, scales="block", hadamard_groups=8), 384),
    "down_one_scale": (LinearSite(low=768, high=0, scales="token", hadamard_groups=8), 768),
    "blocks_of_two": (LinearSite(low=96, high=32, scales="block", scale_groups=2, hadamard_groups=8), 128),
    "weight_groups": (LinearSite(low=192, high=0, scales="token", act_low_bits=8, weight_group=48), 192),
    "weight_groups_heads": (LinearSite(low=224, high=32, scales="part", order="heads", weight_group=28), 256),
    "blocks_with_high": (LinearSite(low=96, high=32, scales="block", hadamard_groups=4), 128),
}
LAYOUTS = [KVLayout(64, 8), KVLayout(32, 4), KVLayout(128, 16), KVLayout(80, 10), KVLayout(64, 0), KVLayout(64, 8, 8)]


@given(rows=st.integers(1, 5), columns=st.integers(1, 60), bits=st.sampled_from([2, 4, 8]), seed=st.integers(0, 2**31))
def test_asymmetric_error_is_at_most_half_a_step(rows: int, columns: int, bits: int, seed: int) -> None:
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 7
    scale, zero = reference.asymmetric_scale(x, bits)
    codes = reference.quantize_asymmetric(x, scale, zero, bits)
    error = (scale * (codes.int() - zero) - x).abs()
    # Half a step of rounding, and up to half a step where the rounded zero point shifts the end of the range.
    assert (error <= scale * 1.0001).all()
    assert (error.mean(-1) <= scale[:, 0] * 0.55).all()


@pytest.mark.parametrize("value", [0.0, 3.0, -3.0])
def test_constant_row_is_exact(value: float) -> None:
    x = torch.full((1, 16), value)
    scale, zero = reference.asymmetric_scale(x, 4)
    codes = reference.quantize_asymmetric(x, scale, zero, 4)
    torch.testing.assert_close(scale * (codes.int() - zero), x)


def test_rounds_half_to_even() -> None:
    x = torch.tensor([[0.0, 0.5, 1.5, 2.5, 15.0]])
    scale, zero = reference.asymmetric_scale(x, 4)
    assert reference.quantize_asymmetric(x, scale, zero, 4).tolist() == [[0, 0, 2, 2, 15]]


@pytest.mark.parametrize("name", SITES)
def test_integer_linear_equals_fake_quantization(name: str) -> None:
    site, columns = SITES[name]
    plan = linear_plan(site, columns, 64)
    generator = torch.Generator().manual_seed(1)
    widths = plan.part_columns
    low = torch.randint(-8, 8, (20, widths[0]), generator=generator, dtype=torch.int8)
    high = torch.randint(-127, 128, (20, widths[1]), generator=generator, dtype=torch.int8)
    groups = (20, site.weight_groups) if site.weight_group else (20,)
    low_scale, high_scale = torch.rand(groups, generator=generator), torch.rand(20, generator=generator)
    bias = torch.randn(20, generator=generator)
    x = torch.randn(7, columns, generator=generator)
    y = reference.linear(x, low, high, low_scale, high_scale, plan, bias)
    fake = reference.fake_quantize_activation(x, plan).double()
    expanded = low_scale.double().reshape(20, -1).repeat_interleave(widths[0] // site.weight_groups, 1)
    expected = fake[:, plan.part_index(0)] @ (low.double() * expanded).T
    expected += fake[:, plan.part_index(1)] @ (high.double() * high_scale.double()[:, None]).T
    torch.testing.assert_close(y.double(), expected + bias, rtol=1e-5, atol=1e-4)


def test_ranks_of_down_proj_sum_to_the_whole() -> None:
    site = SITES["down_blocks"][0]
    generator = torch.Generator().manual_seed(2)
    low = torch.randint(-8, 8, (12, 768), generator=generator, dtype=torch.int8)
    none, scale = torch.empty(12, 0, dtype=torch.int8), torch.rand(12, generator=generator)
    x = torch.randn(3, 768, generator=generator)
    whole = reference.linear(x, low, none, scale, scale, linear_plan(site, 768, 64))
    half = linear_plan(site, 384, 64)
    parts = [reference.linear(x[:, s], low[:, s], none, scale, scale, half) for s in (slice(0, 384), slice(384, 768))]
    torch.testing.assert_close(whole, parts[0] + parts[1], rtol=1e-5, atol=1e-4)


@given(
    layout=st.sampled_from(LAYOUTS),
    block_size=st.sampled_from([16, 32, 48]),
    tokens=st.integers(1, 60),
    heads=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_page_round_trip(layout: KVLayout, block_size: int, tokens: int, heads: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (tokens, heads, layout.head_dim)
    key, value = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator) * 30
    blocks = -(-tokens // block_size)
    table = torch.randperm(blocks + 2, generator=generator)[:blocks]
    cache = torch.randint(0, 256, (blocks + 2, heads, block_size, layout.bytes_per_token), dtype=torch.uint8)
    slots = table.repeat_interleave(block_size)[:tokens] * block_size + torch.arange(tokens) % block_size
    reference.kv_write(key, value, cache, slots, None, layout)
    read_key, read_value = reference.kv_read(cache, table, tokens, layout)
    assert torch.equal(read_key, reference.kv_fake_quantize(key, layout))
    assert torch.equal(read_value, reference.kv_fake_quantize(value, layout))


def test_slot_minus_one_writes_nothing() -> None:
    layout = KVLayout(64, 8)
    cache = torch.zeros(1, 1, 16, layout.bytes_per_token, dtype=torch.uint8)
    reference.kv_write(torch.randn(1, 1, 64), torch.randn(1, 1, 64), cache, torch.tensor([-1]), None, layout)
    assert not cache.any()


def test_all_zero_and_huge_heads_stay_finite() -> None:
    layout = KVLayout(64, 8)
    for x in (torch.zeros(1, 1, 64), torch.full((1, 1, 64), 1e30), torch.full((1, 1, 64), 1e-9)):
        assert reference.kv_fake_quantize(x, layout).isfinite().all()


@pytest.mark.parametrize("window", [-1, 5])
def test_attention_equals_torch_on_dequantized_cache(window: int) -> None:
    layout = KVLayout(32, 4)
    tokens, new = 37, 9
    key, value, query = torch.randn(tokens, 2, 32), torch.randn(tokens, 2, 32), torch.randn(new, 4, 32)
    rotation = torch.linalg.qr(torch.randn(32, 32))[0]
    cache = torch.zeros(3, 2, 16, layout.bytes_per_token, dtype=torch.uint8)
    reference.kv_write(key, value, cache, torch.arange(tokens), rotation, layout)
    out = reference.attention(
        query,
        cache,
        torch.tensor([[0, 1, 2]]),
        torch.tensor([tokens]),
        torch.tensor([0, new]),
        rotation,
        0.2,
        layout,
        window,
    )
    k = reference.kv_fake_quantize(key @ rotation, layout).repeat_interleave(2, 1).transpose(0, 1)
    v = reference.kv_fake_quantize(value, layout).repeat_interleave(2, 1).transpose(0, 1)
    position = torch.arange(tokens - new, tokens)[:, None]
    seen = torch.arange(tokens)[None] <= position
    if window > 0:
        seen &= torch.arange(tokens)[None] > position - window
    expected = torch.nn.functional.scaled_dot_product_attention(
        (query @ rotation).transpose(0, 1), k, v, attn_mask=seen, scale=0.2
    )
    torch.testing.assert_close(out, expected.transpose(0, 1), rtol=1e-4, atol=1e-5)
