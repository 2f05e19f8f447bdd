"""ResQLinearMethod: loading at every tensor-parallel degree, re-laying, and the values that apply() gives."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from resq_vllm import linear as linear_module
from resq_vllm import reference
from resq_vllm.config import ResQConfig
from resq_vllm.errors import ResQError
from resq_vllm.formats.metadata import LinearSite
from resq_vllm.formats.plan import linear_plan
from resq_vllm.formats.weights import pack_int4
from tests.resq_vllm.conftest import FFN, HEAD_DIM, HEADS, HIDDEN, KV_HEADS, quantization_config

Tensors = dict[str, torch.Tensor]
PREFIX = "model.layers.0"
KV_WIDTH = KV_HEADS * HEAD_DIM


def checkpoint_tensors(site: LinearSite, outputs: int, seed: int) -> tuple[Tensors, Tensors]:
    """Random tensors of one HF linear: as the checkpoint stores them, and as plain codes and scales."""
    g = torch.Generator().manual_seed(seed)
    span = 8 if site.weight_low_bits == 4 else 128
    plain = {
        "low": torch.randint(-span, span, (outputs, site.low), generator=g, dtype=torch.int8),
        "high": torch.randint(-128, 128, (outputs, site.high), generator=g, dtype=torch.int8),
        "low_scale": torch.rand(outputs, generator=g) * 0.01 + 0.001,
        "high_scale": torch.rand(outputs, generator=g) * 0.001 + 0.0001,
    }
    stored: Tensors = {}
    if site.low:
        stored["weight_low"] = pack_int4(plain["low"]) if site.weight_low_bits == 4 else plain["low"]
        stored["weight_low_scale"] = plain["low_scale"]
    if site.high:
        stored["weight_high"] = plain["high"]
        stored["weight_high_scale"] = plain["high_scale"]
    return stored, plain


def load(layer: Any, tensors: Tensors, *shard: Any) -> None:
    for name, tensor in tensors.items():
        parameter = getattr(layer, name)
        parameter.weight_loader(parameter, tensor, *shard)


def rows(plain: Tensors, start: int, count: int) -> Tensors:
    return {name: tensor[start : start + count] for name, tensor in plain.items()}


def joined(parts: list[Tensors]) -> Tensors:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def expected(x: torch.Tensor, plain: Tensors, site: LinearSite, bias: torch.Tensor | None = None) -> torch.Tensor:
    plan = linear_plan(site, x.shape[-1], HEAD_DIM)
    return reference.linear(x, plain["low"], plain["high"], plain["low_scale"], plain["high_scale"], plan, bias)


def inputs(columns: int, seed: int = 0, tokens: int = 5) -> torch.Tensor:
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-5 * float(wanted.abs().max()))


def config_with(**sites: dict[str, Any]) -> ResQConfig:
    base = quantization_config()
    return ResQConfig.from_config({**base, "sites": {**base["sites"], **sites}})


def qkv_layer(config: ResQConfig, bias: bool = False) -> Any:
    from vllm.model_executor.layers.linear import QKVParallelLinear

    return QKVParallelLinear(
        HIDDEN, HEAD_DIM, HEADS, KV_HEADS, bias, quant_config=config, prefix=f"{PREFIX}.self_attn.qkv_proj"
    )


def row_layer(config: ResQConfig, name: str, columns: int, bias: bool = False) -> Any:
    from vllm.model_executor.layers.linear import RowParallelLinear

    return RowParallelLinear(columns, HIDDEN, bias, quant_config=config, prefix=f"{PREFIX}.{name}")


@pytest.mark.parametrize("size", [1, 2, 4])
def test_fused_qkv_loads_its_heads_and_replicates_kv_heads(rank_of: Callable[[int, int], None], size: int) -> None:
    config = config_with()
    site = config.metadata.sites["qkv"]
    stored, plain = zip(
        *(checkpoint_tensors(site, n, i) for i, n in enumerate((HIDDEN, KV_WIDTH, KV_WIDTH))), strict=True
    )
    x = inputs(HIDDEN)
    for rank in range(size):
        rank_of(rank, size)
        layer = qkv_layer(config)
        for shard, tensors in zip("qkv", stored, strict=True):
            load(layer, tensors, shard)
        layer.quant_method.process_weights_after_loading(layer)
        q, kv = HIDDEN // size, max(KV_WIDTH // size, HEAD_DIM)
        first = rank * KV_WIDTH // size // HEAD_DIM * HEAD_DIM
        local = joined([rows(plain[0], rank * q, q), rows(plain[1], first, kv), rows(plain[2], first, kv)])
        close(layer.quant_method.apply(layer, x), expected(x, local, site))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_fused_gate_up(rank_of: Callable[[int, int], None], size: int) -> None:
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear

    config = config_with()
    site = config.metadata.sites["gate_up"]
    stored, plain = zip(*(checkpoint_tensors(site, FFN, i) for i in range(2)), strict=True)
    x = inputs(HIDDEN)
    width = FFN // size
    for rank in range(size):
        rank_of(rank, size)
        layer = MergedColumnParallelLinear(
            HIDDEN, [FFN, FFN], bias=False, quant_config=config, prefix=f"{PREFIX}.mlp.gate_up_proj"
        )
        for shard, tensors in enumerate(stored):
            load(layer, tensors, shard)
        layer.quant_method.process_weights_after_loading(layer)
        close(
            layer.quant_method.apply(layer, x),
            expected(x, joined([rows(part, rank * width, width) for part in plain]), site),
        )


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("weight_bits", [4, 8])
def test_down_proj_does_not_depend_on_the_degree(
    rank_of: Callable[[int, int], None], size: int, weight_bits: int
) -> None:
    config = config_with(
        down={"low": FFN, "high": 0, "weight_low_bits": weight_bits, "scales": "block", "hadamard_groups": 4}
    )
    site = config.metadata.sites["down"]
    stored, plain = checkpoint_tensors(site, HIDDEN, 3)
    x = inputs(FFN)
    total = torch.zeros(x.shape[0], HIDDEN)
    for rank in range(size):
        rank_of(rank, size)
        layer = row_layer(config, "mlp.down_proj", FFN)
        load(layer, stored)
        layer.quant_method.process_weights_after_loading(layer)
        width = FFN // size
        total += layer.quant_method.apply(layer, x[:, rank * width : (rank + 1) * width])
    close(total, expected(x, plain, site))


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("scales", ["token", "part", "head"])
def test_o_proj_takes_whole_heads(rank_of: Callable[[int, int], None], size: int, scales: str) -> None:
    bits = 8 if scales == "token" else 4
    config = config_with(o={"low": 112, "high": 16, "act_low_bits": bits, "scales": scales, "order": "heads"})
    site = config.metadata.sites["o"]
    stored, plain = checkpoint_tensors(site, HIDDEN, 4)
    x = inputs(HIDDEN)
    for rank in range(size):
        rank_of(rank, size)
        layer = row_layer(config, "self_attn.o_proj", HIDDEN)
        load(layer, stored)
        layer.quant_method.process_weights_after_loading(layer)
        columns, low, high = HIDDEN // size, 112 // size, 16 // size
        local = {
            **plain,
            "low": plain["low"][:, rank * low : (rank + 1) * low],
            "high": plain["high"][:, rank * high : (rank + 1) * high],
        }
        mine = x[:, rank * columns : (rank + 1) * columns]
        plan = linear_plan(site, columns, HEAD_DIM)
        wanted = reference.linear(mine, local["low"], local["high"], local["low_scale"], local["high_scale"], plan)
        close(layer.quant_method.apply(layer, mine), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bias_and_output_dtype(rank_of: Callable[[int, int], None], dtype: torch.dtype) -> None:
    rank_of(0, 1)
    config = config_with()
    site = config.metadata.sites["qkv"]
    layer = qkv_layer(config, bias=True)
    parts = [checkpoint_tensors(site, n, i) for i, n in enumerate((HIDDEN, KV_WIDTH, KV_WIDTH))]
    for shard, (stored, _) in zip("qkv", parts, strict=True):
        load(layer, stored, shard)
    layer.quant_method.process_weights_after_loading(layer)
    x = inputs(HIDDEN).to(dtype)
    bias = inputs(HIDDEN + 2 * KV_WIDTH, seed=9, tokens=1)[0].to(dtype)
    y = layer.quant_method.apply(layer, x, bias)
    assert y.dtype == dtype
    wanted = expected(x, joined([plain for _, plain in parts]), site, bias)
    tolerance = 2e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(y, wanted, rtol=tolerance, atol=tolerance)


def loaded_down(config: ResQConfig) -> Any:
    layer = row_layer(config, "mlp.down_proj", FFN)
    load(layer, checkpoint_tensors(config.metadata.sites["down"], HIDDEN, 3)[0])
    return layer


def test_checkpoint_tensors_are_freed(rank_of: Callable[[int, int], None]) -> None:
    rank_of(0, 1)
    layer = loaded_down(config_with())
    layer.quant_method.process_weights_after_loading(layer)
    names = {name for name, _ in layer.named_parameters()}
    assert names == {"packed_weight", "weight_scales", "weight_sums"}
    assert layer.weight_scales.shape == (2, HIDDEN)
    before = layer.packed_weight
    layer.quant_method.process_weights_after_loading(layer)
    assert layer.packed_weight is before


def test_apply_compiles_to_one_opaque_op(rank_of: Callable[[int, int], None]) -> None:
    rank_of(0, 1)
    layer = loaded_down(config_with())
    layer.quant_method.process_weights_after_loading(layer)
    calls: list[str] = []

    def backend(graph: torch.fx.GraphModule, example: list[torch.Tensor]) -> Callable[..., Any]:
        calls.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    compiled = torch.compile(lambda x: layer.quant_method.apply(layer, x), backend=backend, fullgraph=True)
    x = inputs(FFN)
    torch.testing.assert_close(compiled(x), layer.quant_method.apply(layer, x), rtol=0, atol=0)
    assert calls == ["resq.linear_planned.default"]


@pytest.mark.parametrize("name", ["weight_low", "weight_low_scale"])
def test_missing_tensor_is_named(rank_of: Callable[[int, int], None], name: str) -> None:
    rank_of(0, 1)
    config = config_with()
    layer = row_layer(config, "mlp.down_proj", FFN)
    stored, _ = checkpoint_tensors(config.metadata.sites["down"], HIDDEN, 3)
    load(layer, {key: tensor for key, tensor in stored.items() if key != name})
    with pytest.raises(ResQError, match=rf"the checkpoint lacks all or part of {PREFIX}.mlp.down_proj.{name};"):
        layer.quant_method.process_weights_after_loading(layer)


def test_missing_shard_of_a_fused_layer_is_named(rank_of: Callable[[int, int], None]) -> None:
    rank_of(0, 1)
    config = config_with()
    layer = qkv_layer(config)
    site = config.metadata.sites["qkv"]
    load(layer, checkpoint_tensors(site, HIDDEN, 0)[0], "q")
    load(layer, checkpoint_tensors(site, KV_WIDTH, 1)[0], "k")
    with pytest.raises(ResQError, match=r"lacks all or part of model.layers.0.self_attn.qkv_proj.weight_low;"):
        layer.quant_method.process_weights_after_loading(layer)


def test_tensor_of_the_wrong_shape_or_type_is_named(rank_of: Callable[[int, int], None]) -> None:
    rank_of(0, 1)
    config = config_with()
    layer = row_layer(config, "mlp.down_proj", FFN)
    with pytest.raises(ResQError, match=r"mlp.down_proj.weight_low has shape \(128, 64\) in the checkpoint"):
        load(layer, {"weight_low": torch.zeros(HIDDEN, FFN // 4, dtype=torch.uint8)})
    with pytest.raises(ResQError, match=r"mlp.down_proj.weight_low has shape \(128, 256\) in the checkpoint"):
        load(layer, {"weight_low": torch.zeros(HIDDEN, FFN, dtype=torch.uint8)})
    with pytest.raises(ResQError, match=r"weight_low_scale is torch.bfloat16 in the checkpoint .* torch.float32"):
        load(layer, {"weight_low_scale": torch.zeros(HIDDEN, dtype=torch.bfloat16)})


def test_layer_of_another_width_is_refused(rank_of: Callable[[int, int], None]) -> None:
    rank_of(0, 1)
    with pytest.raises(ResQError, match=r"mlp.down_proj: quantization_config describes 256 input columns .* has 512"):
        row_layer(config_with(), "mlp.down_proj", 2 * FFN)


def test_degree_that_cuts_hadamard_blocks_is_refused(rank_of: Callable[[int, int], None]) -> None:
    rank_of(0, 8)
    with pytest.raises(ResQError, match=r"mlp.down_proj: hadamard_groups = 4 does not divide by .* degree 8"):
        row_layer(config_with(), "mlp.down_proj", FFN)


def test_degree_that_cuts_heads_is_refused(rank_of: Callable[[int, int], None]) -> None:
    rank_of(0, 16)
    with pytest.raises(ResQError, match=r"self_attn.o_proj: .* whole heads of 16 dims"):
        row_layer(config_with(), "self_attn.o_proj", HIDDEN)


def check_dummy_layer(config: ResQConfig) -> None:
    """A layer loaded by `--load-format dummy` answers with finite values of x's magnitude."""
    from vllm.config import DeviceConfig, LoadConfig, VllmConfig, set_current_vllm_config
    from vllm.model_executor.model_loader.weight_utils import initialize_single_dummy_weight

    vllm_config = VllmConfig(device_config=DeviceConfig(device="cpu"), load_config=LoadConfig(load_format="dummy"))
    with set_current_vllm_config(vllm_config):
        layer = row_layer(config, "self_attn.o_proj", HIDDEN)
    for parameter in layer.parameters():
        initialize_single_dummy_weight(parameter)
    layer.quant_method.process_weights_after_loading(layer)
    y = layer.quant_method.apply(layer, inputs(HIDDEN, tokens=64))
    assert torch.isfinite(y).all()
    assert 0.3 < float(y.std()) < 3.0


def test_dummy_weights_are_finite_and_keep_magnitudes(rank_of: Callable[[int, int], None]) -> None:
    rank_of(0, 1)
    check_dummy_layer(config_with())


def test_start_up_line_names_kernels_bits_and_cache(
    rank_of: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from resq_vllm import ops

    rank_of(0, 1)
    lines: list[tuple[int, str]] = []
    monkeypatch.setattr(linear_module, "log_once", lambda level, message: lines.append((level, message)))
    config = config_with()
    layer = loaded_down(config)
    layer.quant_method.process_weights_after_loading(layer)
    assert lines == [
        (
            logging.INFO,
            f"ResQ: CPU kernels {ops.isa()}; linear W4.00A4.00; KV cache in 16 bits or as --kv-cache-dtype says",
        )
    ]
