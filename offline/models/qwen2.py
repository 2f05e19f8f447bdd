"""Qwen2 and Qwen2.5: biases on q, k and v; the upper layers may have a sliding window."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RMSNorm, Qwen2RotaryEmbedding

from offline.models.adapter import LinearName, ModelAdapter


class Qwen2Adapter(ModelAdapter):
    """``layer_types`` of the config says which layers slide; without ``use_sliding_window`` none does."""

    family = "qwen2"
    architecture = "Qwen2ForCausalLM"
    config_class = Qwen2Config

    def has_bias(self, name: LinearName) -> bool:
        return name in ("q", "k", "v")

    def sliding_window(self, layer: int) -> int | None:
        slides = self.config.layer_types[layer] == "sliding_attention"
        return self.config.sliding_window if slides else None

    def decoder_layer(self, config: Any, layer: int) -> nn.Module:
        return Qwen2DecoderLayer(config, layer)

    def rotary(self, config: Any) -> nn.Module:
        return Qwen2RotaryEmbedding(config)

    def norm_module(self) -> nn.Module:
        return Qwen2RMSNorm(self.hidden_size, eps=self.config.rms_norm_eps)
