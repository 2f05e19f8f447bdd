"""A small ResQ checkpoint of a random model: whole in format, with codes rounded from unrotated weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from offline.calibrate.storage import save_tensors
from offline.pack.expected import attention_names, quantized_linears
from offline.pack.names import BASIS_FILE, CONFIG_FILE, key_rotation_name
from offline.pack.tensors import linear_tensors
from offline.pack.writer import CheckpointWriter
from offline.quantize.mixed import quantize_linear
from resq_vllm.formats.metadata import KVLayer, LinearSite, QuantizationMetadata, format_version
from resq_vllm.formats.plan import linear_plan
from tests.offline.models.tiny import tiny_model, tiny_tokenizer

HIDDEN_SITE = LinearSite(low=42, high=6)
METADATA = QuantizationMetadata(
    tool_version="0.0",
    high_fraction=0.125,
    head_dim=16,
    sites={
        "qkv": HIDDEN_SITE,
        "o": LinearSite(low=56, high=8, act_low_bits=8, scales="token", order="heads"),
        "gate_up": HIDDEN_SITE,
        "down": LinearSite(low=96, high=0, scales="block", hadamard_groups=8),
    },
    kv_cache=[KVLayer(low_bits=4, high=2), KVLayer(low_bits=8), KVLayer(low_bits=16)],
    ignore=["model.layers.2.mlp.down_proj"],
)

EIGHT_BIT_HEAD = METADATA.model_copy(update={"lm_head_bits": 8, "format_version": format_version(8)})
FOUR_BIT_HEAD = METADATA.model_copy(update={"lm_head_bits": 4, "format_version": format_version(4)})


def orthogonal(dim: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(dim, dim, generator=generator))[0]


def write_checkpoint(
    folder: Path,
    family: str = "llama",
    max_shard_bytes: int = 1 << 30,
    metadata: QuantizationMetadata = METADATA,
) -> Any:
    """Write to ``folder`` and return the plain random model that it was made of.

    Its three layers keep the KV cache in 4/8, in 8 and in 16 bits, and one down_proj is not quantized.
    """
    model = tiny_model(family)
    linears = quantized_linears(model, metadata)
    config = model.config.to_dict() | {"quantization_config": metadata.model_dump(mode="json")}
    config["tie_word_embeddings"] = False
    with CheckpointWriter(folder, max_shard_bytes) as writer:
        for name, tensor in model.state_dict().items():
            module, _, leaf = name.rpartition(".")
            if module not in linears:
                writer.add({name: tensor})
            elif leaf == "weight":
                linear, site = linears[module]
                plan = linear_plan(site, linear.in_features, METADATA.head_dim)
                bias = None if linear.bias is None else linear.bias.detach()
                writer.add(linear_tensors(quantize_linear(tensor, None, plan), module, bias))
        for layer, attention in enumerate(attention_names(model)):
            if METADATA.kv_cache[layer].low_bits != 16:
                writer.add({key_rotation_name(attention): orthogonal(16, layer)})
        writer.write_json(CONFIG_FILE, config)
        tiny_tokenizer().save_pretrained(writer.partial)
        writer.finalise()
    return model


def write_bases(folder: Path) -> None:
    """Saved bases beside the checkpoint: variances 1, 2, …, so that every share is known."""
    tensors: dict[str, torch.Tensor] = {}
    for site, shape in (("residual", (48,)), ("value", (3, 2, 16)), ("key", (3, 16))):
        tensors[f"{site}_variance"] = torch.arange(1.0, shape[-1] + 1, dtype=torch.float64).expand(shape).clone()
        tensors[site] = torch.eye(shape[-1], dtype=torch.float64).expand(*shape, shape[-1]).clone()
    save_tensors(folder / BASIS_FILE, tensors, {"kind": "resq-basis-1", "fingerprint": "none"})
