"""ResQConfig: parsing, refusing, and choosing a method per layer."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from resq_vllm import config as config_module
from resq_vllm import cuda
from resq_vllm.config import SITE_OF_MODULE, LinearBits, ResQConfig, check_model
from resq_vllm.errors import ResQError
from resq_vllm.formats.metadata import QuantizationMetadata
from resq_vllm.formats.plan import linear_plan
from resq_vllm.linear import ResQLinearMethod
from tests.resq_vllm.conftest import MODEL_CONFIG, quantization_config

LAYER = "model.layers.0.mlp.down_proj"


def config_of(**changes: Any) -> ResQConfig:
    return ResQConfig.from_config(quantization_config(**changes))


def test_without_quantization_config_the_sentence_says_what_to_do() -> None:
    with pytest.raises(ResQError, match=r"serves only checkpoints made by `resq quantize`.*leave --quantization out"):
        ResQConfig()


def test_from_config_keeps_the_metadata() -> None:
    config = config_of()
    assert config.get_name() == "resq"
    assert config.metadata == QuantizationMetadata.from_dict(quantization_config())
    assert config.get_supported_act_dtypes() == [torch.bfloat16, torch.float16, torch.float32]
    assert config.get_config_filenames() == []
    assert config.get_min_capability() == 80


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"surprise": 1}, "config.json quantization_config: field surprise is invalid"),
        ({"format_version": 5}, "format_version 5 is unknown"),
        ({"quant_method": "gptq"}, "was not quantized by resq"),
        ({"kv_cache": [{"low_bits": 3}]}, "field kv_cache.0.low_bits is invalid"),
    ],
)
def test_bad_field_is_named(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ResQError, match=sentence):
        config_of(**changes)


def test_config_travels_to_the_workers() -> None:
    config = config_of(ignore=["lm_head"])
    again = pickle.loads(pickle.dumps(config))
    assert again.metadata == config.metadata
    assert again.ignore == ["lm_head"]


@pytest.mark.parametrize("module", sorted(SITE_OF_MODULE))
def test_every_module_name_has_its_site(module: str) -> None:
    config = config_of()
    assert config.site(f"model.layers.3.x.{module}") is config.metadata.sites[SITE_OF_MODULE[module]]


def test_module_of_no_site_is_refused() -> None:
    with pytest.raises(ResQError, match=r"model.layers.0.mlp.router: not one of .* and not in the ignore list"):
        config_of().site("model.layers.0.mlp.router")


@pytest.mark.parametrize(
    ("ignore", "prefix", "expected"),
    [
        ([], LAYER, False),
        ([LAYER], LAYER, True),
        (["model.layers.0.mlp"], LAYER, True),
        (["model.layers.0"], "model.layers.01.mlp.down_proj", False),
        (["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"], LAYER, False),
    ],
)
def test_ignore_list(ignore: list[str], prefix: str, expected: bool) -> None:
    assert config_of(ignore=ignore).is_ignored(prefix) is expected


def test_fused_layer_is_ignored_by_all_of_its_parts_or_none() -> None:
    qkv = [f"model.layers.0.self_attn.{p}_proj" for p in "qkv"]
    fused = "model.layers.0.self_attn.qkv_proj"
    for ignore, expected in ((qkv, True), ([], False), (["model.layers.0.self_attn"], True)):
        config = config_of(ignore=ignore)
        config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
        assert config.is_ignored(fused) is expected
    config = config_of(ignore=qkv[:2])
    config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    with pytest.raises(ResQError, match="must name all or none of"):
        config.is_ignored(fused)


def test_vllm_mapper_renames_the_ignore_list() -> None:
    from vllm.model_executor.models.utils import WeightsMapper

    config = config_of(ignore=["language_model.model.layers.0.mlp.down_proj"])
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"language_model.": ""}))
    assert config.is_ignored(LAYER)


def test_layers_get_their_methods(process_group: None) -> None:
    from vllm.model_executor.layers.linear import RowParallelLinear, UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod

    config = config_of(ignore=["model.layers.1.mlp.down_proj"])
    layer = RowParallelLinear(256, 128, bias=False, quant_config=config, prefix=LAYER)
    assert isinstance(layer.quant_method, ResQLinearMethod)
    kept = RowParallelLinear(256, 128, bias=False, quant_config=config, prefix="model.layers.1.mlp.down_proj")
    assert isinstance(kept.quant_method, UnquantizedLinearMethod)
    head = ParallelLMHead(96, 128, quant_config=config, prefix="lm_head")
    assert isinstance(head.quant_method, UnquantizedEmbeddingMethod)
    assert config.get_quant_method(torch.nn.Module(), "anything") is None


def hf_config(**changes: Any) -> Any:
    values = {**MODEL_CONFIG, **changes}
    config = SimpleNamespace(**values)
    config.get_text_config = lambda: config
    return config


def test_metadata_of_the_right_model_passes() -> None:
    check_model(config_of().metadata, hf_config(), "m/config.json")
    implied = hf_config(head_dim=None, hidden_size=128, num_attention_heads=8)
    check_model(config_of().metadata, implied, "m/config.json")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"hidden_size": 256}, "sites.qkv"),
        ({"num_attention_heads": 4}, "sites.o"),
        ({"intermediate_size": 512}, "sites.down"),
        ({"num_hidden_layers": 3}, "kv_cache"),
        ({"head_dim": 32}, "head_dim"),
    ],
)
def test_metadata_of_another_model_is_refused(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ResQError, match=rf"m/config.json: quantization_config.{field}.* but the model has"):
        check_model(config_of().metadata, hf_config(**changes), "m/config.json")


def test_tied_embeddings_are_refused() -> None:
    with pytest.raises(ResQError, match="tie_word_embeddings must be false"):
        check_model(config_of().metadata, hf_config(tie_word_embeddings=True), "m/config.json")


def test_kv_high_wider_than_a_head_is_refused() -> None:
    metadata = config_of(kv_cache=[{"low_bits": 4, "high": 2}, {"low_bits": 4, "high": 16}]).metadata
    with pytest.raises(ResQError, match=r"kv_cache.1.high = 16 does not fit head_dim 16"):
        check_model(metadata, hf_config(), "m/config.json")


def test_front_end_checks_the_model_and_the_kernels() -> None:
    with pytest.raises(ResQError, match=r"some/model/config.json: quantization_config.head_dim"):
        config_of().maybe_update_config("some/model", hf_config=hf_config(head_dim=8))


def platform(name: str, cuda: bool) -> SimpleNamespace:
    return SimpleNamespace(is_cpu=lambda: False, is_cuda=lambda: cuda, device_name=name)


def test_platform_without_kernels_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_module, "current_platform", platform("xpu", False))
    with pytest.raises(ResQError, match="vLLM runs on xpu here, and resq-vllm has kernels for CPUs and NVIDIA GPUs"):
        config_of().maybe_update_config("some/model", hf_config=hf_config())


def test_gpu_without_the_cuda_library_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_module, "current_platform", platform("cuda", True))
    monkeypatch.setattr(cuda, "load", lambda: (None, "resq-vllm was built without its CUDA kernels; reinstall it"))
    with pytest.raises(ResQError, match="vLLM runs on cuda here, but resq-vllm was built without its CUDA kernels"):
        config_of().maybe_update_config("some/model", hf_config=hf_config())


def test_gpu_with_the_cuda_library_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_module, "current_platform", platform("cuda", True))
    monkeypatch.setattr(cuda, "load", lambda: (config_module, ""))
    config_of().maybe_update_config("some/model", hf_config=hf_config())


def test_missing_library_is_one_sentence_when_a_model_is_loaded() -> None:
    code = (
        "import sys\n"
        "sys.modules['resq_vllm._C'] = None\n"
        "from resq_vllm.plugin import register\n"
        "register()\n"
        "from resq_vllm.config import ResQConfig\n"
        "from resq_vllm.errors import ResQError\n"
        "from tests.resq_vllm.conftest import quantization_config\n"
        "try:\n"
        "    ResQConfig.from_config(quantization_config()).maybe_update_config('some/model')\n"
        "except ResQError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "the compiled kernels resq_vllm/_C.abi3.so cannot be loaded" in done.stdout


def test_vllm_selects_resq_from_config_json(model_dir: Callable[..., Path]) -> None:
    from vllm.engine.arg_utils import EngineArgs

    from resq_vllm.plugin import register

    register()
    for quantization in (None, "resq"):
        folder = model_dir(quantization_config())
        args = EngineArgs(str(folder), quantization=quantization, skip_tokenizer_init=True, dtype="float32")
        found = args.create_engine_config().quant_config
        assert isinstance(found, ResQConfig)
        assert found.metadata == config_of().metadata


def test_quantization_flag_on_a_plain_model_is_one_sentence(model_dir: Callable[..., Path]) -> None:
    from vllm.engine.arg_utils import EngineArgs

    from resq_vllm.plugin import register

    register()
    args = EngineArgs(str(model_dir(None)), quantization="resq", skip_tokenizer_init=True, dtype="float32")
    with pytest.raises(ValueError, match="serves only checkpoints made by `resq quantize`"):
        args.create_engine_config()


def test_tally_weighs_layers_by_their_size() -> None:
    metadata = config_of().metadata
    bits = LinearBits()
    assert str(bits) == "none"
    qkv, down = metadata.sites["qkv"], metadata.sites["down"]
    bits.add(qkv, linear_plan(qkv, 128, 16), outputs=10)
    assert str(bits) == "W4.50A4.50"
    bits.add(down, linear_plan(down, 256, 16), outputs=5)
    assert str(bits) == "W4.25A4.17"
