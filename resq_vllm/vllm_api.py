"""Every vLLM symbol that this project touches, imported when first used: the one place to look when vLLM moves one.

``from resq_vllm.vllm_api import X`` works for each name in SYMBOLS. Importing lazily keeps ``plugin.register`` light,
which vLLM calls in every process before it has configured torch. tests/resq_vllm/test_vllm_api.py holds what is assumed
of each symbol.
"""

from __future__ import annotations

import importlib
import logging
import re
from typing import Any

from resq_vllm.errors import ResQError
from resq_vllm.log import log_once

TESTED_VERSIONS = ("0.32", "0.33")

SYMBOLS: dict[str, str] = {
    "Attention": "vllm.model_executor.layers.attention.attention",
    "AttentionBackend": "vllm.v1.attention.backend",
    "AttentionCGSupport": "vllm.v1.attention.backend",
    "AttentionBackendEnum": "vllm.v1.attention.backends.registry",
    "AttentionImpl": "vllm.v1.attention.backend",
    "AttentionLayerBase": "vllm.model_executor.layers.attention_layer_base",
    "AttentionMetadata": "vllm.v1.attention.backend",
    "AttentionMetadataBuilder": "vllm.v1.attention.backend",
    "AttentionSpec": "vllm.v1.kv_cache_interface",
    "AttentionType": "vllm.v1.attention.backend",
    "BaseKVCacheMethod": "vllm.model_executor.layers.quantization.kv_cache",
    "ChannelQuantScaleParameter": "vllm.model_executor.parameter",
    "CommonAttentionMetadata": "vllm.v1.attention.backend",
    "CompilationMode": "vllm.config",
    "InductorPass": "vllm.compilation.passes.inductor_pass",
    "KVCacheLayout": "vllm.v1.kv_cache_interface",
    "LayerNameType": "vllm.utils.torch_utils",
    "LinearBase": "vllm.model_executor.layers.linear",
    "LinearMethodBase": "vllm.model_executor.layers.linear",
    "ModelWeightParameter": "vllm.model_executor.parameter",
    "MultipleOf": "vllm.v1.attention.backend",
    "ParallelLMHead": "vllm.model_executor.layers.vocab_parallel_embedding",
    "QuantizationConfig": "vllm.model_executor.layers.quantization.base_config",
    "RoutedExperts": "vllm.model_executor.layers.fused_moe",
    "UnquantizedEmbeddingMethod": "vllm.model_executor.layers.vocab_parallel_embedding",
    "UnquantizedLinearMethod": "vllm.model_executor.layers.linear",
    "VllmConfig": "vllm.config",
    "VocabParallelEmbedding": "vllm.model_executor.layers.vocab_parallel_embedding",
    "current_platform": "vllm.platforms",
    "extract_layer_index": "vllm.model_executor.models.utils",
    "get_attention_context": "vllm.model_executor.layers.attention.attention",
    "get_current_vllm_config": "vllm.config",
    "get_layers_from_vllm_config": "vllm.config",
    "get_tensor_model_parallel_rank": "vllm.distributed",
    "get_tensor_model_parallel_world_size": "vllm.distributed",
    "has_kv_transfer_group": "vllm.distributed.kv_transfer",
    "register_quantization_config": "vllm.model_executor.layers.quantization",
    "register_weight_loader_v2_supported_method": "vllm.model_executor.layers.linear",
    "set_weight_attrs": "vllm.model_executor.utils",
    "split_decodes_and_prefills": "vllm.v1.attention.backends.utils",
    "unified_attention_with_output": "vllm.model_executor.layers.attention.attention",
}


def vllm_version() -> str:
    """Version of the installed vLLM, e.g. "0.32.0+cpu". Raises ResQError when there is none."""
    return str(_import("vllm.version").__version__)


def check_version() -> None:
    """Warn, once a process, when the installed vLLM is outside the tested versions."""
    version = vllm_version()
    found = re.match(r"\d+\.\d+", version)
    if found is None or found.group() not in TESTED_VERSIONS:
        tested = " and ".join(TESTED_VERSIONS)
        log_once(logging.WARNING, f"resq-vllm is tested with vLLM {tested}; vLLM {version} may not work with it")


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "vllm":
            raise
        if error.name == "vllm":
            raise ResQError(
                f"vLLM is not installed: install vLLM {' or '.join(TESTED_VERSIONS)} beside resq-vllm to serve models"
            ) from error
        raise ResQError(_moved(module)) from error


def _moved(what: str) -> str:
    return f"vLLM {vllm_version()} has no {what}, which resq-vllm needs: install vLLM {' or '.join(TESTED_VERSIONS)}"


def __getattr__(name: str) -> Any:
    module = SYMBOLS.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        symbol = getattr(_import(module), name)
    except AttributeError as error:
        raise ResQError(_moved(f"{module}.{name}")) from error
    globals()[name] = symbol
    return symbol
