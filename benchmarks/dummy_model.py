"""Model folders without weights, for `--load-format dummy`: one shape, in every quantization."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from offline.bundled import MODEL_DIR
from offline.models.registry import adapter_for
from offline.pipeline.options import QuantizeOptions
from offline.pipeline.publish import copied_files
from offline.pipeline.sites import build_metadata
from resq_vllm.formats.metadata import LMHeadBits

# Enough for the longest scenario (benchmarks.scenarios).
POSITIONS = 8192


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama-type decoder; the bundled model's vocabulary unless another is given."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int = 4096

    def with_vocabulary(self, size: int) -> Shape:
        """The same layers under another vocabulary."""
        return replace(self, vocab_size=size)


SHAPES = {
    "small": Shape(768, 2048, 12, 12, 4, 64),
    "1b": Shape(2048, 8192, 16, 32, 8, 64),
    "8b": Shape(4096, 14336, 32, 32, 8, 128),
}


def bf16_config(shape: Shape) -> dict[str, Any]:
    """config.json of a bf16 model; untied, as a quantized model always is."""
    config: dict[str, Any] = json.loads((MODEL_DIR / "config.json").read_text())
    return config | asdict(shape) | {"tie_word_embeddings": False, "max_position_embeddings": POSITIONS}


def resq_config(shape: Shape, lm_head_bits: LMHeadBits = 16) -> dict[str, Any]:
    """The same model as `resq quantize` with its default options and `--lm-head-bits` would describe it."""
    config = bf16_config(shape)
    options = QuantizeOptions.checked(model="dummy", output=Path("dummy"), lm_head_bits=lm_head_bits)
    metadata = build_metadata(adapter_for(LlamaConfig(**config)), options)
    return config | {"quantization_config": metadata.model_dump(mode="json")}


def _with(quantization: dict[str, Any]) -> Callable[[Shape], dict[str, Any]]:
    return lambda shape: bf16_config(shape) | {"quantization_config": quantization}


_INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
_W8A8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": _INT8 | {"strategy": "channel", "dynamic": False},
            "input_activations": _INT8 | {"strategy": "token", "dynamic": True},
        }
    },
}
_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
_AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}

CONFIGS: dict[str, Callable[[Shape], dict[str, Any]]] = {
    "bf16": bf16_config,
    "resq": resq_config,
    "resq-lm8": lambda shape: resq_config(shape, 8),
    "resq-lm4": lambda shape: resq_config(shape, 4),
    "w8a8": _with(_W8A8),
    "gptq": _with(_GPTQ),
    "awq": _with(_AWQ),
    # What an engine occupies beside the weights (benchmarks.weightless).
    "weightless": _with({"quant_method": "weightless"}),
}


def write_model(target: Path, config: dict[str, Any]) -> Path:
    """A model folder: config and the bundled tokenizer."""
    target.mkdir(parents=True)
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for path in copied_files(MODEL_DIR):
        shutil.copy(path, target)
    return target


def write_models(folder: Path, shape: Shape, names: Iterable[str] = ("bf16", "resq")) -> dict[str, Path]:
    """Write the named entries of CONFIGS below `folder`; returns their folders by name."""
    return {name: write_model(folder / name, CONFIGS[name](shape)) for name in names}
