"""A method's finished layers as one transformers model, for lm-eval and generation."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from offline.methods.lab import Lab
from offline.models.attention import ATTENTION_NAME
from offline.models.layer import LoadedLayer
from offline.quantize.lm_head import OutputHead
from resq_vllm.formats.metadata import LM_HEAD


class WholeModel:
    """Collects the layers of :func:`offline.methods.run.run_method`; memory: the whole model in float32."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._layers: list[LoadedLayer] = []
        self._top: tuple[torch.Tensor, OutputHead] | None = None

    def keep(self, layer: LoadedLayer) -> None:
        """The next layer, its roundings set."""
        self._layers.append(layer)

    def finish(self, embedding: torch.Tensor, head: OutputHead) -> None:
        """What stands outside the layers."""
        self._top = embedding, head

    def model(self) -> Any:
        """A causal language model in eval mode that computes as the layers did."""
        if self._top is None or len(self._layers) != self._lab.adapter.num_layers:
            raise RuntimeError("the method has not run through all layers")
        adapter, runner = self._lab.adapter, self._lab.runner
        embedding, head = self._top
        config = runner.config
        tied = config.tie_word_embeddings
        # A rotated embedding and lm_head differ; transformers would tie them again.
        config.tie_word_embeddings = False
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION_NAME, dtype=runner.dtype)
        finally:
            config.tie_word_embeddings = tied
        state = {
            adapter.embedding: embedding,
            adapter.final_norm: head.norm,
            adapter.lm_head: head.weight,
        }
        state = {name: value.to(runner.device, runner.dtype) for name, value in state.items()}
        for index, layer in enumerate(self._layers):
            state |= layer.tensors()
            layer.install(model.get_submodule(adapter.layer_prefix(index).rstrip(".")))
        model.load_state_dict(state, strict=True, assign=True)
        model.get_submodule(LM_HEAD).register_forward_pre_hook(lambda module, args: (head.rounding(args[0]),))
        _refill_buffers(model, adapter.rotary(config))
        return model.eval()


def _refill_buffers(model: nn.Module, rotary: nn.Module) -> None:
    """Rotary frequencies are in no state dict: a module built on the meta device gets them from one that has them."""
    for name, module in model.named_modules():
        if type(module) is type(rotary):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, rotary)
