"""Llama (1 to 3.2) and every model that names its architecture LlamaForCausalLM."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

from offline.models.adapter import LinearName, ModelAdapter


class LlamaAdapter(ModelAdapter):
    """Biases on request of the config: ``attention_bias`` for q, k, v, o and ``mlp_bias`` for gate, up, down."""

    family = "llama"
    architecture = "LlamaForCausalLM"
    config_class = LlamaConfig

    def has_bias(self, name: LinearName) -> bool:
        return bool(self.config.attention_bias if name in ("q", "k", "v", "o") else self.config.mlp_bias)

    def sliding_window(self, layer: int) -> int | None:
        return None

    def decoder_layer(self, config: Any, layer: int) -> nn.Module:
        return LlamaDecoderLayer(config, layer)

    def rotary(self, config: Any) -> nn.Module:
        return LlamaRotaryEmbedding(config)

    def norm_module(self) -> nn.Module:
        return LlamaRMSNorm(self.hidden_size, eps=self.config.rms_norm_eps)
