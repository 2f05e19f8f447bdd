"""What tensors a checkpoint must hold: those of its Hugging Face architecture, with the linear sites packed."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from offline.pack.names import key_rotation_name, site_of
from offline.pack.tensors import TensorSpec, linear_specs
from offline.transformers_errors import TRANSFORMERS_ERRORS, reason
from resq_vllm.errors import ResQError
from resq_vllm.formats.metadata import LM_HEAD, LinearSite, QuantizationMetadata

UNPACKED_KV_BITS = 16


def plain_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy without ``quantization_config``: the architecture alone."""
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def meta_model(config: PreTrainedConfig, source: str) -> nn.Module:
    """The architecture without memory for its weights. Raises ResQError when transformers does not know it."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(plain_config(config))
    except TRANSFORMERS_ERRORS as error:
        raise ResQError(
            f"{source}: transformers cannot build a {config.model_type!r} causal language model from it "
            f"({reason(error)}); check the file, or install a transformers release that knows it"
        ) from error


def quantized_linears(model: nn.Module, metadata: QuantizationMetadata) -> dict[str, tuple[nn.Linear, LinearSite]]:
    """The linear modules that the checkpoint holds packed, by name in model order; a quantized lm_head too."""
    found: dict[str, tuple[nn.Linear, LinearSite]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or name in metadata.ignore:
            continue
        site = site_of(name)
        spec = metadata.lm_head_site if name == LM_HEAD else None if site is None else metadata.sites[site]
        if spec is not None:
            found[name] = (module, spec)
    return found


def attention_names(model: nn.Module) -> list[str]:
    """Attention modules in layer order: the parents of the k projections."""
    return [name.rpartition(".")[0] for name, _ in model.named_modules() if name.endswith(".k_proj")]


def expected_tensors(model: nn.Module, metadata: QuantizationMetadata, source: str) -> dict[str, TensorSpec]:
    """Every tensor of the checkpoint by name.

    Args:
        model: the architecture, on the meta device or not.
        metadata: of the checkpoint.
        source: config.json, for messages.

    Raises ResQError when metadata and architecture disagree (layers, head_dim, widths of a site).

    """
    packed = quantized_linears(model, metadata)
    specs: dict[str, TensorSpec] = {}
    for name, tensor in model.state_dict().items():
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module in packed:
            linear, site = packed[module]
            if linear.in_features != site.low + site.high:
                raise ResQError(
                    f"{source}: sites.{site_of(module) or 'qkv'} has {site.low} + {site.high} columns but {module} has "
                    f"{linear.in_features} inputs; quantize the model again with this release"
                )
            specs.update(linear_specs(module, linear.out_features, site))
        else:
            specs[name] = TensorSpec(None, tuple(tensor.shape))
    attentions = attention_names(model)
    if len(attentions) != len(metadata.kv_cache):
        raise ResQError(
            f"{source}: kv_cache describes {len(metadata.kv_cache)} layers but the model has {len(attentions)}; "
            "quantize the model again with this release"
        )
    head_dim = metadata.head_dim
    for attention, layer in zip(attentions, metadata.kv_cache, strict=True):
        if layer.low_bits != UNPACKED_KV_BITS:
            specs[key_rotation_name(attention)] = TensorSpec(torch.float32, (head_dim, head_dim))
    return specs
