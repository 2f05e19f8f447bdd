"""Mistral: Llama's layers without biases, with a sliding window in every layer where the config sets one."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.models.mistral.configuration_mistral import MistralConfig
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer, MistralRMSNorm, MistralRotaryEmbedding

from offline.models.adapter import LinearName, ModelAdapter


class MistralAdapter(ModelAdapter):
    """No biases; head_dim is often not d/h (Mistral-Nemo)."""

    family = "mistral"
    architecture = "MistralForCausalLM"
    config_class = MistralConfig

    def has_bias(self, name: LinearName) -> bool:
        return False

    def sliding_window(self, layer: int) -> int | None:
        return self.config.sliding_window

    def decoder_layer(self, config: Any, layer: int) -> nn.Module:
        return MistralDecoderLayer(config, layer)

    def rotary(self, config: Any) -> nn.Module:
        return MistralRotaryEmbedding(config)

    def norm_module(self) -> nn.Module:
        return MistralRMSNorm(self.hidden_size, eps=self.config.rms_norm_eps)
