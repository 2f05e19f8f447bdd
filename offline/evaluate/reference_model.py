"""Loads a model folder as a transformers model: a ResQ checkpoint in fake quantization, or a plain model as it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from offline.evaluate.fake_quant import FakeQuantCache, FakeQuantLinear, attach_cache, register_attention
from offline.pack.expected import UNPACKED_KV_BITS
from offline.pack.reader import ResQCheckpoint, is_resq_checkpoint
from offline.transformers_errors import TRANSFORMERS_ERRORS, reason
from resq_vllm.errors import ResQError
from resq_vllm.formats.kv_layout import KVLayout


def load_reference_model(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model of ``directory`` ready for evaluation.

    Args:
        directory: a ResQ checkpoint or a plain Hugging Face folder.
        dtype: of everything that is not quantized (the residual stream, norms, embeddings, lm_head; a plain model's
            weights too): float32 or bfloat16.

    Returns a transformers causal language model in eval mode. Raises ResQError when the folder cannot be read.

    """
    directory = Path(directory)
    if is_resq_checkpoint(directory):
        return resq_model(ResQCheckpoint(directory), dtype)
    return load_plain_model(directory, dtype)


def load_plain_model(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    """An unquantized model folder as transformers loads it, in ``dtype``."""
    try:
        return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    except TRANSFORMERS_ERRORS as error:
        raise ResQError(f"transformers cannot load {directory} ({reason(error)}); give a model folder") from error


def resq_model(checkpoint: ResQCheckpoint, dtype: torch.dtype = torch.float32) -> Any:
    """The architecture of ``checkpoint`` with fake-quantized linears and attention, filled from its tensors."""
    with _parameters_on_meta():
        model = AutoModelForCausalLM.from_config(
            checkpoint.hf_config, attn_implementation=register_attention(), dtype=dtype
        )
    packed = checkpoint.linears
    for name in packed:
        bias = f"{name}.bias"
        linear = FakeQuantLinear(checkpoint.linear(name), checkpoint.tensor(bias) if bias in checkpoint.specs else None)
        replace_module(model, name, linear)
    state = {
        name: checkpoint.tensor(name).to(dtype)
        for name, parameter in model.named_parameters()
        if parameter.device.type == "meta"
    }
    model.load_state_dict(state, strict=False, assign=True)
    head_dim = checkpoint.metadata.head_dim
    for layer, (attention, cache) in enumerate(zip(checkpoint.attentions, checkpoint.metadata.kv_cache, strict=True)):
        layout = None if cache.low_bits == UNPACKED_KV_BITS else KVLayout(head_dim, cache.high, cache.low_bits)
        attach_cache(model.get_submodule(attention), FakeQuantCache(layout, checkpoint.key_rotation(layer)))
    return model.eval()


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` where ``model`` has the submodule ``name``."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules built inside have parameters without storage but real buffers (no file holds the rotary frequencies)."""
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(self, name, parameter)
        if parameter is not None:
            self._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
