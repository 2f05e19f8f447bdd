"""Qwen3 (dense): Qwen2's layers with an RMSNorm on every query and key head, and no biases unless the config asks."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3RMSNorm, Qwen3RotaryEmbedding

from offline.models.adapter import LinearName, ModelAdapter


class Qwen3Adapter(ModelAdapter):
    """``attention_bias`` gives q, k, v and o biases; ``layer_types`` says which layers slide, as in Qwen2."""

    family = "qwen3"
    architecture = "Qwen3ForCausalLM"
    config_class = Qwen3Config
    head_norm_paths: ClassVar[tuple[str, ...]] = ("self_attn.q_norm", "self_attn.k_norm")

    def has_bias(self, name: LinearName) -> bool:
        return name in ("q", "k", "v", "o") and bool(self.config.attention_bias)

    def sliding_window(self, layer: int) -> int | None:
        slides = self.config.layer_types[layer] == "sliding_attention"
        return self.config.sliding_window if slides else None

    def decoder_layer(self, config: Any, layer: int) -> nn.Module:
        return Qwen3DecoderLayer(config, layer)

    def rotary(self, config: Any) -> nn.Module:
        return Qwen3RotaryEmbedding(config)

    def norm_module(self) -> nn.Module:
        return Qwen3RMSNorm(self.hidden_size, eps=self.config.rms_norm_eps)
