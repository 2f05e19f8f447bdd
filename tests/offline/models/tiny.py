"""Random models small enough to compare against exactly, and their folders on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB = 64
# head_dim 16 is not hidden/heads (12): nothing may assume that it is. FFN 96 = 8 blocks of 12: a Paley order.
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}
FAMILIES = ("llama", "llama-bias", "qwen2", "qwen2-window", "qwen3", "qwen3-bias", "mistral-window")


def tiny_model(family: str, seed: int = 0) -> Any:
    """A random transformers model, float32, with norm weights and biases away from 1 and 0."""
    torch.manual_seed(seed)
    if family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True))
    elif family == "llama-bias":
        model = LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True))
    elif family == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**SIZES))
    elif family == "qwen2-window":
        window = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
        model = Qwen2ForCausalLM(Qwen2Config(**SIZES, **window, tie_word_embeddings=True))
    elif family == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**SIZES, tie_word_embeddings=True))
    elif family == "qwen3-bias":
        model = Qwen3ForCausalLM(Qwen3Config(**SIZES, attention_bias=True))
    elif family == "mistral-window":
        model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=5))
    else:
        raise ValueError(family)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.3, 2.0)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.5)
    return model.eval()


def save_tiny(family: str, folder: Path, seed: int = 0, shard_size: str = "5GB") -> Any:
    """Save ``tiny_model`` to a folder; a small ``shard_size`` makes several shards and an index."""
    model = tiny_model(family, seed)
    model.save_pretrained(folder, max_shard_size=shard_size)
    return model


def tiny_tokenizer(bos: bool = True) -> PreTrainedTokenizerFast:
    """Words w0 to w61 are ids 2 to 63; id 0 is unknown, id 1 BOS (put first only where the caller does it)."""
    vocab = {"<unk>": 0, "<s>": 1} | {f"w{i}": i + 2 for i in range(VOCAB - 2)}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    special = {"bos_token": "<s>"} if bos else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **special)


def random_sequences(lengths: list[int], seed: int = 0) -> list[torch.Tensor]:
    """Token ids [1, T] for each length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCAB, (1, length), generator=generator) for length in lengths]
