"""Tiny models with random weights and the bundled tokenizer: quantized in about a second."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from offline.bundled import MODEL_DIR

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
    "LICENSE",
)


SIZES: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
}


def tiny_llama(folder: Path) -> Path:
    torch.manual_seed(0)
    return saved(LlamaForCausalLM(LlamaConfig(**SIZES)), folder)


def tiny_qwen3(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """With norms of queries and keys away from one, and weights large enough for attention to matter."""
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**SIZES, initializer_range=0.1))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_norm.weight.uniform_(0.5, 4.0)
            layer.self_attn.k_norm.weight.uniform_(0.5, 4.0)
    return saved(model, folder, dtype)


def saved(model: Any, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    model.to(dtype).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copyfile(MODEL_DIR / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_models(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One of each kind of layer that goes through the whole pipeline."""
    return {"llama": tiny_model, "qwen3": tiny_qwen3(tmp_path_factory.mktemp("models") / "tiny-qwen3")}


@pytest.fixture
def model_copy(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture
def flags(tmp_path: Path) -> Callable[..., list[str]]:
    """Command line of a quick quantization into tmp_path/out."""

    def make(model: Path, *extra: str, output: str = "out") -> list[str]:
        quick = ["--nsamples", "4", "--seqlen", "64", "--eval-windows", "1"]
        return ["quantize", str(model), "-o", str(tmp_path / output), *quick, *extra]

    return make
