"""Model folders without weights, for speed measurements with `--load-format dummy`: bf16 and ResQ of one shape."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from offline.bundled import MODEL_DIR
from offline.models.registry import adapter_for
from offline.pipeline.options import QuantizeOptions
from offline.pipeline.publish import copied_files
from offline.pipeline.sites import build_metadata


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama-type decoder."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int


SHAPES = {
    "small": Shape(768, 2048, 12, 12, 4, 64),
    "1b": Shape(2048, 8192, 16, 32, 8, 64),
}


def bf16_config(shape: Shape) -> dict[str, Any]:
    """config.json of a bf16 model with the bundled model's vocabulary; untied, as a quantized model always is."""
    config: dict[str, Any] = json.loads((MODEL_DIR / "config.json").read_text())
    return config | asdict(shape) | {"tie_word_embeddings": False}


def resq_config(shape: Shape) -> dict[str, Any]:
    """The same model as `resq quantize` with its default options would describe it."""
    config = bf16_config(shape)
    options = QuantizeOptions.checked(model="dummy", output=Path("dummy"))
    metadata = build_metadata(adapter_for(LlamaConfig(**config)), options)
    return config | {"quantization_config": metadata.model_dump(mode="json")}


def write_models(folder: Path, shape: Shape) -> dict[str, Path]:
    """Write both folders (config and the bundled tokenizer) below `folder`; returns them by name."""
    models = {"bf16": bf16_config(shape), "resq": resq_config(shape)}
    for name, config in models.items():
        target = folder / name
        target.mkdir(parents=True)
        (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for path in copied_files(MODEL_DIR):
            shutil.copy(path, target)
    return {name: folder / name for name in models}
