"""What the offline half must know of a model family: sizes, tensor names, biases and how to build one decoder layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from resq_vllm.errors import ResQError
from resq_vllm.formats.metadata import SiteName

LinearName = Literal["q", "k", "v", "o", "gate", "up", "down"]
NormName = Literal["input", "post"]

# The linears of a site read the same input, so they share its basis, its quantizer and its second moment.
SITE_LINEARS: dict[SiteName, tuple[LinearName, ...]] = {
    "qkv": ("q", "k", "v"),
    "o": ("o",),
    "gate_up": ("gate", "up"),
    "down": ("down",),
}
LINEARS: tuple[LinearName, ...] = ("q", "k", "v", "o", "gate", "up", "down")


class ModelAdapter(ABC):
    """One model: the sizes of its config and the names of its tensors.

    Names follow Hugging Face checkpoints. ``hidden_size`` d, ``num_heads`` h, ``num_kv_heads``, ``head_dim`` (the
    config's own where it has one: it need not be d/h), ``intermediate_size`` f.
    """

    family: ClassVar[str]
    architecture: ClassVar[str]
    config_class: ClassVar[Any]

    embedding: ClassVar[str] = "model.embed_tokens.weight"
    final_norm: ClassVar[str] = "model.norm.weight"
    lm_head: ClassVar[str] = "lm_head.weight"
    attention_path: ClassVar[str] = "self_attn"
    linear_paths: ClassVar[dict[LinearName, str]] = {
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    }
    norm_paths: ClassVar[dict[NormName, str]] = {"input": "input_layernorm", "post": "post_attention_layernorm"}
    # RMSNorms of every query and key head, where a family has them. They stand before RoPE and U_C, so nothing is fused
    # into them.
    head_norm_paths: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: Any) -> None:
        """``config``: a transformers config of this family; raises ResQError when its sizes do not fit together."""
        self.config = config
        self.hidden_size: int = config.hidden_size
        self.num_layers: int = config.num_hidden_layers
        self.num_heads: int = config.num_attention_heads
        self.num_kv_heads: int = config.num_key_value_heads
        self.intermediate_size: int = config.intermediate_size
        self.vocab_size: int = config.vocab_size
        self.tied: bool = bool(config.tie_word_embeddings)
        # A config without head_dim means d/h: transformers builds the layers so.
        self.head_dim: int = getattr(config, "head_dim", None) or self.hidden_size // self.num_heads
        for field in ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "intermediate_size"):
            if getattr(self, field) < 1:
                raise ResQError(f"config.json: {field} is {getattr(self, field)}; it must be positive")
        if self.num_heads % self.num_kv_heads:
            raise ResQError(
                f"config.json: {self.num_heads} heads are no multiple of {self.num_kv_heads} key/value heads; "
                "mend num_attention_heads or num_key_value_heads"
            )

    @property
    def heads_per_kv(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads

    def layer_prefix(self, layer: int) -> str:
        """Prefix of all tensors of decoder layer ``layer``, with the closing dot."""
        return f"model.layers.{layer}."

    def linear(self, layer: int, name: LinearName) -> str:
        """Module name of a linear; its tensors are this + ``.weight`` and, where it has one, ``.bias``."""
        return self.layer_prefix(layer) + self.linear_paths[name]

    def norm(self, layer: int, name: NormName) -> str:
        """Tensor name of the RMSNorm weight before attention ("input") or before the MLP ("post")."""
        return self.layer_prefix(layer) + self.norm_paths[name] + ".weight"

    def norm_shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Every RMSNorm weight of decoder layer ``layer`` and its shape."""
        shapes: dict[str, tuple[int, ...]] = {self.norm(layer, name): (self.hidden_size,) for name in self.norm_paths}
        return shapes | {f"{self.layer_prefix(layer)}{path}.weight": (self.head_dim,) for path in self.head_norm_paths}

    def linear_shape(self, name: LinearName) -> tuple[int, int]:
        """[out, in] of a linear's weight."""
        d, f = self.hidden_size, self.intermediate_size
        query, key = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        shapes = {"q": (query, d), "k": (key, d), "v": (key, d), "o": (d, query)}
        shapes |= {"gate": (f, d), "up": (f, d), "down": (d, f)}
        return shapes[name]

    def layer_shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Every tensor of decoder layer ``layer`` and its shape."""
        shapes = self.norm_shapes(layer)
        for name in LINEARS:
            shapes[self.linear(layer, name) + ".weight"] = self.linear_shape(name)
            if self.has_bias(name):
                shapes[self.linear(layer, name) + ".bias"] = self.linear_shape(name)[:1]
        return shapes

    def model_shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors outside the decoder layers and their shapes; a tied model has no lm_head of its own."""
        table = (self.vocab_size, self.hidden_size)
        shapes: dict[str, tuple[int, ...]] = {self.embedding: table, self.final_norm: (self.hidden_size,)}
        return shapes if self.tied else shapes | {self.lm_head: table}

    @abstractmethod
    def has_bias(self, name: LinearName) -> bool:
        """Whether that linear has a bias."""

    @property
    def has_qkv_bias(self) -> bool:
        """Whether q, k and v have biases."""
        return self.has_bias("q")

    @abstractmethod
    def sliding_window(self, layer: int) -> int | None:
        """Tokens that a query of this layer sees (itself included), or None for all earlier ones."""

    @abstractmethod
    def decoder_layer(self, config: Any, layer: int) -> nn.Module:
        """transformers' decoder layer; ``config`` is this model's config or a copy with other run-time settings."""

    @abstractmethod
    def rotary(self, config: Any) -> nn.Module:
        """transformers' rotary embedding: (hidden states, position ids) -> (cos, sin)."""

    @abstractmethod
    def norm_module(self) -> nn.Module:
        """transformers' RMSNorm of this model, weight [d] of ones."""

    def empty_layer(self, config: Any, layer: int) -> nn.Module:
        """The decoder layer without storage (device "meta"), ready for load_state_dict(assign=True)."""
        with torch.device("meta"):
            return self.decoder_layer(config, layer).eval()
