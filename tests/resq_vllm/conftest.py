"""A tiny model's quantization_config, and vLLM's single-rank process group, for tests of the plugin."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, LAYERS, VOCAB = 128, 8, 2, 16, 256, 2, 96

MODEL_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


def quantization_config(**changes: Any) -> dict[str, Any]:
    """quantization_config of the tiny model; ``changes`` replace top-level fields."""
    config: dict[str, Any] = {
        "quant_method": "resq",
        "format_version": 2,
        "tool_version": "test",
        "high_fraction": 0.125,
        "head_dim": HEAD_DIM,
        "max_tp": 4,
        "sites": {
            "qkv": {"low": 112, "high": 16},
            "gate_up": {"low": 112, "high": 16},
            "o": {"low": 112, "high": 16, "act_low_bits": 8, "scales": "token", "order": "heads"},
            "down": {"low": FFN, "high": 0, "scales": "block", "hadamard_groups": 4},
        },
        "kv_cache": [{"low_bits": 4, "high": 2}] * LAYERS,
    }
    return {**config, **changes}


@pytest.fixture
def resq_dict() -> Callable[..., dict[str, Any]]:
    return quantization_config


@pytest.fixture
def model_dir(tmp_path: Path) -> Callable[..., Path]:
    """Writes a model folder with config.json only: model_dir(quantization_config or None, **config changes)."""

    def write(quantization: dict[str, Any] | None, **changes: Any) -> Path:
        config = {**MODEL_CONFIG, **changes}
        if quantization is not None:
            config["quantization_config"] = quantization
        folder = tmp_path / "model"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return write


@pytest.fixture(scope="session")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """vLLM's distributed state for one rank, as a worker has it while it builds layers."""
    from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
    from vllm.distributed import (
        cleanup_dist_env_and_memory,
        init_distributed_environment,
        initialize_model_parallel,
    )

    # vLLM's CPU runner makes these no-ops, too: without an accelerator torch raises.
    patch = pytest.MonkeyPatch()
    patch.setattr("torch.accelerator.empty_cache", lambda: None)
    patch.setattr("torch.accelerator.synchronize", lambda: None)
    store = tmp_path_factory.mktemp("distributed") / "store"
    with set_current_vllm_config(VllmConfig(device_config=DeviceConfig(device="cpu"))):
        init_distributed_environment(1, 0, f"file://{store}", 0, "gloo")
        initialize_model_parallel(1, 1)
        yield
    cleanup_dist_env_and_memory()
    patch.undo()


@pytest.fixture
def rank_of(monkeypatch: pytest.MonkeyPatch, process_group: None) -> Callable[[int, int], None]:
    """rank_of(rank, size): layers made from now on believe to be that rank."""
    import vllm.model_executor.layers.linear as layers
    import vllm.model_executor.layers.vocab_parallel_embedding as vocabulary
    import vllm.model_executor.parameter as parameter

    def set_rank(rank: int, size: int) -> None:
        for module in (layers, vocabulary, parameter):
            monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
            monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: size)

    return set_rank


@pytest.fixture
def default_dtype() -> Iterator[Callable[[torch.dtype], None]]:
    """default_dtype(dtype): torch's default from now on, as vLLM sets it to the served dtype while it builds layers."""
    before = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(before)
