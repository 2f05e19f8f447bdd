"""ResQKVCacheMethod on real vLLM models: the swap, what it refuses, opting out, and loading the rotation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from resq_vllm import config as config_module
from resq_vllm import kv_cache as kv_cache_module
from resq_vllm import ops
from resq_vllm.attention import ResQAttentionImpl, require_all_packed
from resq_vllm.errors import ResQError
from resq_vllm.formats.kv_layout import KVLayout
from resq_vllm.kv_cache import ResQKVCacheMethod, describe, require_packed, unsupported, unsupported_settings
from resq_vllm.plugin import register
from resq_vllm.vllm_api import Attention, AttentionBackendEnum
from tests.resq_vllm.conftest import HEAD_DIM, KV_HEADS, LAYERS, quantization_config

ModelDir = Callable[..., Path]
LAYOUT = KVLayout(HEAD_DIM, 2)


def engine_config(folder: Path, **arguments: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    register()
    given = {"skip_tokenizer_init": True, "dtype": "float32", "load_format": "dummy", **arguments}
    return EngineArgs(str(folder), **given).create_engine_config()


@contextmanager
def built(vllm_config: Any) -> Iterator[Any]:
    """The model with dummy weights, processed as a worker does."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import get_model

    with set_current_vllm_config(vllm_config):
        yield get_model(vllm_config=vllm_config)


def attention_layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, Attention)]


def test_every_layer_of_a_model_is_swapped(process_group: None, model_dir: ModelDir) -> None:
    vllm_config = engine_config(model_dir(quantization_config()))
    with built(vllm_config) as model:
        layers = attention_layers(model)
        assert len(layers) == LAYERS
        for layer in layers:
            assert isinstance(layer.impl, ResQAttentionImpl)
            assert layer.get_attn_backend().get_name() == "RESQ"
            assert layer.backend is AttentionBackendEnum.CUSTOM
            assert layer.impl.scale == pytest.approx(HEAD_DIM**-0.5)
            assert layer.impl.num_kv_heads == KV_HEADS
            assert torch.equal(layer.key_rotation, torch.eye(HEAD_DIM))
        require_all_packed(vllm_config)
        assert describe(vllm_config.quant_config) == (
            "KV cache 4/8-bit 36 bytes per token and head (bf16: 64), packed in 2 of 2 layers, "
            "144 bytes per token on this rank (bf16: 256, 1.78 times as much)"
        )


def test_attention_kernels_are_logged_once(
    process_group: None, model_dir: ModelDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[tuple[int, str]] = []
    monkeypatch.setattr(kv_cache_module, "log_once", lambda level, message: lines.append((level, message)))
    for dtype in (torch.float32, torch.bfloat16):
        lines.clear()
        with built(engine_config(model_dir(quantization_config()), dtype=str(dtype).removeprefix("torch."))):
            kernels = ops.attention_kernels(dtype, HEAD_DIM, 2, 4)
            # The same line for every layer: log_once writes it the first time.
            assert lines == [(logging.INFO, f"ResQ: attention: {kernels}")] * LAYERS


def test_sixteen_bit_layers_keep_vllm_s_backend(process_group: None, model_dir: ModelDir) -> None:
    kv = [{"low_bits": 16, "high": 0}, {"low_bits": 8, "high": 0}]
    vllm_config = engine_config(model_dir(quantization_config(kv_cache=kv)))
    with built(vllm_config) as model:
        first, second = attention_layers(model)
        assert not isinstance(first.impl, ResQAttentionImpl)
        assert not hasattr(first, "key_rotation")
        assert second.impl.layout == KVLayout(HEAD_DIM, 0, 8)
        assert describe(vllm_config.quant_config) == (
            "KV cache 8-bit 38 bytes per token and head (bf16: 64), packed in 1 of 2 layers, "
            "332 bytes per token on this rank (bf16: 256, 0.77 times as much)"
        )


def opted_out(monkeypatch: pytest.MonkeyPatch, vllm_config: Any) -> tuple[list[bool], list[str]]:
    """Which layers are packed, and the warnings."""
    lines: list[tuple[int, str]] = []
    monkeypatch.setattr(config_module, "log_once", lambda level, message: lines.append((level, message)))
    with built(vllm_config) as model:
        packed = [isinstance(layer.impl, ResQAttentionImpl) for layer in attention_layers(model)]
    return packed, [message for level, message in lines if level == logging.WARNING]


@pytest.mark.parametrize("dtype", ["fp8", "bfloat16"])
def test_explicit_cache_dtype_opts_out_and_says_so(
    process_group: None, model_dir: ModelDir, monkeypatch: pytest.MonkeyPatch, dtype: Any
) -> None:
    vllm_config = engine_config(model_dir(quantization_config()), kv_cache_dtype=dtype, dtype="bfloat16")
    packed, lines = opted_out(monkeypatch, vllm_config)
    assert packed == [False, False]
    assert lines == [f"ResQ: vLLM's own KV cache is used, because --kv-cache-dtype is {dtype}"] * LAYERS


def test_skipped_layer_opts_out_alone(
    process_group: None, model_dir: ModelDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm_config = engine_config(model_dir(quantization_config()), kv_cache_dtype_skip_layers=["1"])
    packed, lines = opted_out(monkeypatch, vllm_config)
    assert packed == [True, False]
    assert lines == ["ResQ: vLLM's own KV cache is used, because --kv-cache-dtype-skip-layers names layer 1"]


def test_layer_that_the_metadata_does_not_know_is_refused() -> None:
    config = config_module.ResQConfig.from_config(quantization_config())
    with pytest.raises(ResQError, match=r"model.layers.2.self_attn.attn: .*kv_cache describes 2 layers only"):
        config._decide_kv(torch.nn.Module(), "model.layers.2.self_attn.attn")


class _Layer(Attention):
    """An Attention layer with attributes only, as ``create_weights`` finds it."""

    def __init__(self, **changes: Any) -> None:
        torch.nn.Module.__init__(self)
        values: dict[str, Any] = {
            "layer_name": "model.layers.0.self_attn.attn",
            "impl": SimpleNamespace(alibi_slopes=None, logits_soft_cap=0, scale=0.25),
            "attn_type": "decoder",
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_size": HEAD_DIM,
            "head_size_v": HEAD_DIM,
            "has_sink": False,
            "use_mm_prefix": False,
            "kv_sharing_target_layer_name": None,
        }
        for name, value in {**values, **changes}.items():
            object.__setattr__(self, name, value)


def plain_attention(**changes: Any) -> Any:
    layer = _Layer(**changes)
    layer.__class__ = Attention
    return layer


def test_ordinary_decoder_layer_is_supported() -> None:
    assert unsupported(plain_attention(), LAYOUT) == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"attn_type": "encoder_only"}, "encoder_only attention"),
        ({"attn_type": "encoder_decoder"}, "encoder_decoder attention"),
        ({"head_size": 32, "head_size_v": 32}, r"heads of 32 dims \(it was made for 16\)"),
        ({"head_size_v": 8}, "value heads of 8 dims"),
        ({"impl": SimpleNamespace(alibi_slopes=[0.5], logits_soft_cap=0)}, "ALiBi"),
        ({"impl": SimpleNamespace(alibi_slopes=None, logits_soft_cap=30.0)}, "a logits soft cap"),
        ({"has_sink": True}, "attention sinks"),
        ({"kv_sharing_target_layer_name": "model.layers.0.self_attn.attn"}, "KV sharing between layers"),
        ({"use_mm_prefix": True}, "bidirectional multimodal prefixes"),
    ],
)
def test_what_the_packed_cache_cannot_do_is_refused(changes: dict[str, Any], reason: str) -> None:
    method = ResQKVCacheMethod(config_module.ResQConfig.from_config(quantization_config()), LAYOUT)
    sentence = f"model.layers.0.self_attn.attn: the packed KV cache does not support {reason}; serve with an explicit"
    with pytest.raises(ResQError, match=sentence):
        method.create_weights(plain_attention(**changes))


@pytest.mark.parametrize(
    ("parallel", "window", "reason"),
    [
        ({"decode_context_parallel_size": 2}, None, "decode context parallelism"),
        ({"prefill_context_parallel_size": 2}, None, "prefill context parallelism"),
        ({}, 128, "reference sliding-window attention"),
    ],
)
def test_settings_that_the_packed_cache_cannot_do_are_refused(
    parallel: dict[str, int], window: int | None, reason: str
) -> None:
    sizes = {"decode_context_parallel_size": 1, "prefill_context_parallel_size": 1, **parallel}
    config: Any = SimpleNamespace(
        parallel_config=SimpleNamespace(**sizes), model_config=SimpleNamespace(rswa_window=window)
    )
    assert unsupported_settings(config) == [reason]


def test_other_attention_layers_are_refused() -> None:
    assert unsupported(_Layer(), LAYOUT) == ["layers of type _Layer"]


def swapped_layer(model: Any) -> Any:
    layer = attention_layers(model)[0]
    layer.resq_dummy = False
    return layer


def test_rotation_loads_whole(process_group: None, model_dir: ModelDir) -> None:
    with built(engine_config(model_dir(quantization_config()))) as model:
        layer = swapped_layer(model)
        rotation = torch.linalg.qr(torch.randn(HEAD_DIM, HEAD_DIM, generator=torch.Generator().manual_seed(0)))[0]
        layer.key_rotation.weight_loader(layer.key_rotation, rotation)
        layer.quant_method.process_weights_after_loading(layer)
        assert torch.equal(layer.key_rotation, rotation)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (torch.nan, "the checkpoint lacks model.layers.0.self_attn.attn.key_rotation; quantize the model again"),
        (1.1, "model.layers.0.self_attn.attn.key_rotation is not orthogonal"),
    ],
)
def test_bad_rotation_is_named(process_group: None, model_dir: ModelDir, content: float, sentence: str) -> None:
    with built(engine_config(model_dir(quantization_config()))) as model:
        layer = swapped_layer(model)
        layer.key_rotation.weight_loader(layer.key_rotation, torch.eye(HEAD_DIM) * content)
        with pytest.raises(ResQError, match=sentence):
            layer.quant_method.process_weights_after_loading(layer)


def test_rotation_of_another_shape_is_named(process_group: None, model_dir: ModelDir) -> None:
    with built(engine_config(model_dir(quantization_config()))) as model:
        rotation = swapped_layer(model).key_rotation
        with pytest.raises(ResQError, match=r"key_rotation has shape \(8, 8\) in the checkpoint instead of \(16, 16\)"):
            rotation.weight_loader(rotation, torch.eye(8))


def test_impl_replaced_behind_our_back_is_found(process_group: None, model_dir: ModelDir) -> None:
    vllm_config = engine_config(model_dir(quantization_config()))
    with built(vllm_config) as model:
        layer = attention_layers(model)[1]
        layer.impl = SimpleNamespace()
        sentence = "model.layers.1.self_attn.attn: SimpleNamespace took the place of the packed KV cache's attention"
        with pytest.raises(ResQError, match=sentence):
            require_packed(layer)
        with pytest.raises(ResQError, match=sentence):
            require_all_packed(vllm_config)
