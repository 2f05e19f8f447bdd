"""LQER's layers in the plugin: weight scales per column group, A and B at every tensor-parallel degree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from resq_vllm import reference
from resq_vllm.config import ResQConfig
from resq_vllm.errors import ResQError
from resq_vllm.formats.metadata import LinearSite
from resq_vllm.formats.plan import linear_plan
from resq_vllm.formats.weights import pack_int4
from tests.resq_vllm.conftest import FFN, HEAD_DIM, HIDDEN, KV_HEADS
from tests.resq_vllm.test_linear import (
    PREFIX,
    check_dummy_layer,
    close,
    config_with,
    inputs,
    load,
    qkv_layer,
    row_layer,
)

Tensors = dict[str, torch.Tensor]
SetRank = Callable[[int, int], None]
KV_WIDTH = KV_HEADS * HEAD_DIM
RANK, GROUP = 3, 32


def site_fields(columns: int, **changes: Any) -> dict[str, Any]:
    fields = {"low": columns, "high": 0, "act_low_bits": 8, "scales": "token", "weight_group": GROUP, "low_rank": RANK}
    return fields | changes


def lqer_config(**changes: Any) -> ResQConfig:
    wide = site_fields(HIDDEN, **changes)
    return config_with(qkv=wide, o=wide, gate_up=wide, down=site_fields(FFN, **changes))


def module_tensors(site: LinearSite, outputs: int, seed: int) -> Tensors:
    """Random checkpoint tensors of one Hugging Face module; "codes" is what weight_low packs."""
    g = torch.Generator().manual_seed(seed)
    columns = site.low
    return {
        "codes": torch.randint(-8, 8, (outputs, columns), generator=g, dtype=torch.int8),
        "weight_low_scale": torch.rand(outputs, site.weight_groups, generator=g) * 0.01 + 0.001,
        "low_rank_a": torch.randn(columns, site.low_rank, generator=g) * 0.3,
        "low_rank_b": torch.randn(site.low_rank, outputs, generator=g) * 0.1,
    }


def stored(module: Tensors) -> Tensors:
    return {k: v for k, v in module.items() if k != "codes"} | {"weight_low": pack_int4(module["codes"])}


def wanted(x: torch.Tensor, modules: list[Tensors], site: LinearSite) -> torch.Tensor:
    """The modules' outputs side by side, each by the reference, on one rank."""
    plan = linear_plan(site, site.low, HEAD_DIM)
    outputs = []
    for m in modules:
        none, zero = torch.empty(len(m["codes"]), 0, dtype=torch.int8), torch.zeros(len(m["codes"]))
        y = reference.linear(x, m["codes"], none, m["weight_low_scale"], zero, plan)
        outputs.append(y + x @ m["low_rank_a"] @ m["low_rank_b"])
    return torch.cat(outputs, -1)


def rows(module: Tensors, start: int, count: int) -> Tensors:
    cut = {name: tensor[start : start + count] for name, tensor in module.items()}
    return cut | {
        "low_rank_a": module["low_rank_a"],
        "low_rank_b": module["low_rank_b"][:, start : start + count],
    }


def columns(module: Tensors, start: int, count: int) -> Tensors:
    first, groups = start // GROUP, count // GROUP
    return {
        "codes": module["codes"][:, start : start + count],
        "weight_low_scale": module["weight_low_scale"][:, first : first + groups],
        "low_rank_a": module["low_rank_a"][start : start + count],
        "low_rank_b": module["low_rank_b"],
    }


@pytest.mark.parametrize("size", [1, 2, 4])
def test_fused_qkv(rank_of: SetRank, size: int) -> None:
    config = lqer_config()
    site = config.metadata.sites["qkv"]
    modules = [module_tensors(site, n, i) for i, n in enumerate((HIDDEN, KV_WIDTH, KV_WIDTH))]
    x = inputs(HIDDEN)
    for rank in range(size):
        rank_of(rank, size)
        layer = qkv_layer(config)
        for shard, module in zip("qkv", modules, strict=True):
            load(layer, stored(module), shard)
        layer.quant_method.process_weights_after_loading(layer)
        q, kv = HIDDEN // size, max(KV_WIDTH // size, HEAD_DIM)
        first = rank * KV_WIDTH // size // HEAD_DIM * HEAD_DIM  # kv heads are replicated beyond their number
        local = [rows(modules[0], rank * q, q), rows(modules[1], first, kv), rows(modules[2], first, kv)]
        close(layer.quant_method.apply(layer, x), wanted(x, local, site))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_fused_gate_up(rank_of: SetRank, size: int) -> None:
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear

    config = lqer_config()
    site = config.metadata.sites["gate_up"]
    modules = [module_tensors(site, FFN, i) for i in range(2)]
    x, width = inputs(HIDDEN), FFN // size
    for rank in range(size):
        rank_of(rank, size)
        layer = MergedColumnParallelLinear(
            HIDDEN, [FFN, FFN], bias=False, quant_config=config, prefix=f"{PREFIX}.mlp.gate_up_proj"
        )
        for shard, module in enumerate(modules):
            load(layer, stored(module), shard)
        layer.quant_method.process_weights_after_loading(layer)
        assert layer.low_rank_a.shape == (HIDDEN, 2 * RANK)
        close(
            layer.quant_method.apply(layer, x),
            wanted(x, [rows(module, rank * width, width) for module in modules], site),
        )


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(("name", "width"), [("self_attn.o_proj", HIDDEN), ("mlp.down_proj", FFN)])
def test_row_parallel_ranks(rank_of: SetRank, size: int, name: str, width: int) -> None:
    config = lqer_config()
    site = config.site(name)
    module = module_tensors(site, HIDDEN, 5)
    x, share = inputs(width), width // size
    local_site = site.model_copy(update={"low": share})
    for rank in range(size):
        rank_of(rank, size)
        layer = row_layer(config, name, width)
        load(layer, stored(module))
        layer.quant_method.process_weights_after_loading(layer)
        mine = x[:, rank * share : (rank + 1) * share]
        close(layer.quant_method.apply(layer, mine), wanted(mine, [columns(module, rank * share, share)], local_site))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    group=st.sampled_from([2, 6, 8, 24, 48, 96]),
    rank=st.integers(0, 9),
    scales=st.sampled_from(["token", "block"]),
    seed=st.integers(0, 2**31),
)
def test_any_group_and_rank(rank_of: SetRank, group: int, rank: int, scales: str, seed: int) -> None:
    rank_of(0, 1)
    fields: dict[str, Any] = site_fields(96, weight_group=group, low_rank=rank, scales=scales)
    if scales == "block":
        fields["scale_groups"] = 96 // group
    config = config_with(down=fields)
    site = config.metadata.sites["down"]
    module = module_tensors(site, HIDDEN, seed)
    layer = row_layer(config, "mlp.down_proj", 96)
    tensors = stored(module)
    load(layer, tensors if rank else {k: v for k, v in tensors.items() if not k.startswith("low_rank")})
    layer.quant_method.process_weights_after_loading(layer)
    x = inputs(96, seed)
    close(layer.quant_method.apply(layer, x), wanted(x, [module], site))
    assert (layer.low_rank_a is None) == (rank == 0)


def test_factors_are_cast_to_the_served_dtype(rank_of: SetRank, default_dtype: Callable[[torch.dtype], None]) -> None:
    rank_of(0, 1)
    config = lqer_config()
    site = config.metadata.sites["down"]
    module = module_tensors(site, HIDDEN, 1)
    default_dtype(torch.bfloat16)
    layer = row_layer(config, "mlp.down_proj", FFN)
    load(layer, stored(module))
    layer.quant_method.process_weights_after_loading(layer)
    default_dtype(torch.float32)
    assert layer.low_rank_a.dtype == layer.low_rank_b.dtype == torch.bfloat16
    x = inputs(FFN).to(torch.bfloat16)
    y = layer.quant_method.apply(layer, x)
    assert y.dtype == torch.bfloat16
    exact = wanted(x.float(), [module], site)
    torch.testing.assert_close(y.float(), exact, rtol=2e-2, atol=2e-2 * float(exact.abs().max()))


def test_compiles_without_a_break(rank_of: SetRank) -> None:
    rank_of(0, 1)
    config = lqer_config()
    layer = row_layer(config, "mlp.down_proj", FFN)
    load(layer, stored(module_tensors(config.metadata.sites["down"], HIDDEN, 2)))
    layer.quant_method.process_weights_after_loading(layer)
    compiled = torch.compile(lambda x: layer.quant_method.apply(layer, x), backend="aot_eager", fullgraph=True)
    x = inputs(FFN)
    torch.testing.assert_close(compiled(x), layer.quant_method.apply(layer, x), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["low_rank_a", "low_rank_b", "weight_low_scale"])
def test_missing_or_misshapen_tensor_is_named(rank_of: SetRank, name: str) -> None:
    rank_of(0, 1)
    config = lqer_config()
    tensors = stored(module_tensors(config.metadata.sites["down"], HIDDEN, 2))
    layer = row_layer(config, "mlp.down_proj", FFN)
    load(layer, {key: tensor for key, tensor in tensors.items() if key != name})
    with pytest.raises(ResQError, match=rf"lacks all or part of {PREFIX}.mlp.down_proj.{name};"):
        layer.quant_method.process_weights_after_loading(layer)
    with pytest.raises(ResQError, match=rf"mlp.down_proj.{name} has shape .* in the checkpoint"):
        load(layer, {name: torch.cat((tensors[name], tensors[name]), 1)})
    with pytest.raises(ResQError, match=rf"mlp.down_proj.{name} is torch.int32 in the checkpoint"):
        load(layer, {name: tensors[name].int()})


def test_missing_module_of_a_fused_layer_is_named(rank_of: SetRank) -> None:
    rank_of(0, 1)
    config = lqer_config()
    layer = qkv_layer(config)
    site = config.metadata.sites["qkv"]
    for shard, outputs in (("q", HIDDEN), ("k", KV_WIDTH), ("v", KV_WIDTH)):
        tensors = stored(module_tensors(site, outputs, 0))
        load(layer, {k: v for k, v in tensors.items() if shard != "v" or k != "low_rank_b"}, shard)
    with pytest.raises(ResQError, match=r"lacks all or part of model.layers.0.self_attn.qkv_proj.low_rank_b;"):
        layer.quant_method.process_weights_after_loading(layer)


def test_degree_that_cuts_weight_groups_is_refused(rank_of: SetRank) -> None:
    rank_of(0, 8)
    with pytest.raises(ResQError, match=r"mlp.down_proj: weight_group = 64 does not divide the 32 low columns"):
        row_layer(lqer_config(weight_group=64), "mlp.down_proj", FFN)


def test_dummy_weights_are_finite(rank_of: SetRank) -> None:
    rank_of(0, 1)
    check_dummy_layer(lqer_config())


def test_bits_count_factors(rank_of: SetRank) -> None:
    rank_of(0, 1)
    config = lqer_config()
    row_layer(config, "mlp.down_proj", FFN)
    bits = 4 + 16 * RANK * (FFN + HIDDEN) / (FFN * HIDDEN)
    assert str(config.linear_bits) == f"W{bits:.2f}A8.00"
