"""lm_head on this rank's rows of the vocabulary: quantized (``ResQLMHeadMethod``), or in bfloat16 on the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from resq_vllm import ops
from resq_vllm.errors import ResQError
from resq_vllm.formats.plan import LinearPlan
from resq_vllm.linear import ResQLinearMethod
from resq_vllm.vllm_api import (
    LinearBase,
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
    current_platform,
)

if TYPE_CHECKING:
    from resq_vllm.config import ResQConfig

# Tokens up to which ops.linear_bf16 reads the weight faster than torch's product: 32000 x 2048, two threads, 34, 35 and
# 30 GB/s for 1, 2 and 4 tokens against oneDNN's 25, but 20 against 26 for 8.
FEW_TOKENS = 4


class ResQLMHeadMethod(ResQLinearMethod):
    """lm_head as a linear layer of 8-bit columns, or of 4- and 8-bit ones; vLLM's logits processor calls :meth:`apply`.

    vLLM pads the vocabulary to a multiple of 64 and deals it to the ranks; its loader cuts every rank's rows out of the
    checkpoint's tensors and fills up with zeros, codes and scales alike. A byte of zeros is two codes 0, so the sum of
    such a row's codes, which inputs' zero points are multiplied with, is 0 as well: padding gets the logit 0 that a
    16-bit head gives it, and is cut off after the gather.
    """

    def __init__(self, config: ResQConfig) -> None:
        site = config.metadata.lm_head_site
        if site is None:
            raise ResQError("lm_head is in 16 bits in this checkpoint; quantize the model with --lm-head-bits 8 or 4")
        super().__init__(config, site)

    def tally(self, plan: LinearPlan, outputs: int, modules: int) -> None:
        """Say in the start-up line that the head is quantized; its bits are not those of the decoder's linears."""
        weights = f"{self.site.weight_bits:.2f}".removesuffix(".00")
        self.config.lm_head = f"W{weights}A{self.site.act_high_bits}"

    def tie_weights(self, layer: LinearBase, embed_tokens: torch.nn.Module) -> LinearBase:
        """vLLM's request to share the embedding's rows. Raises ResQError: a quantized head has rows of its own."""
        raise ResQError(
            f"{layer.prefix}: a quantized lm_head cannot share the embedding's weights; set tie_word_embeddings to "
            "false in config.json"
        )


class BFloat16EmbeddingMethod(UnquantizedEmbeddingMethod):
    """vLLM's own bfloat16 embedding or head from one copy of the weight, read faster where a step has few tokens.

    vLLM's method has oneDNN keep a re-laid copy, of the embedding as well, which is never multiplied: 2 x 0.5 GiB with
    Llama 3.2 1B's vocabulary. torch's product of the weight as it lies is no slower up to 32 tokens (32000 x 2048: 8.5
    ms each), at 64 it takes 12.2 ms instead of 10.5. Whoever shares the weight (a tied head, LoRA around the layer)
    finds it as it was.
    """

    def process_weights_after_loading(self, layer: VocabParallelEmbedding) -> None:
        if layer.weight.is_contiguous() and not layer.weight.is_meta:
            ops.prefer_huge_pages(layer.weight.data)

    def apply(self, layer: VocabParallelEmbedding, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., K] -> logits [..., N] of this rank."""
        weight = layer.weight
        fits = x.dtype == weight.dtype == torch.bfloat16 and (bias is None or bias.dtype == torch.bfloat16)
        if fits and x.numel() <= FEW_TOKENS * x.shape[-1] and weight.is_contiguous():
            return ops.linear_bf16(x, weight, bias)
        return torch.nn.functional.linear(x, weight, bias)


def float_embedding_method(dtype: torch.dtype) -> tuple[BFloat16EmbeddingMethod | None, str]:
    """The method of an embedding and head of ``dtype`` that are not quantized, None for vLLM's own; and for the head in
    words, what runs and why."""
    if not current_platform.is_cpu():
        return None, ""
    if dtype != torch.bfloat16:
        return (
            None,
            f"lm_head runs on vLLM's own product, since ours for few tokens takes bf16, not {float_name(dtype)}",
        )
    return BFloat16EmbeddingMethod(), f"lm_head runs on our kernel up to {FEW_TOKENS} tokens a step, on torch's above"


def is_lm_head(layer: torch.nn.Module, prefix: str) -> bool:
    """Whether ``layer`` is the model's lm_head (and not a draft model's or the embedding)."""
    return isinstance(layer, ParallelLMHead) and prefix.rpartition(".")[2] == "lm_head"


def float_name(dtype: torch.dtype) -> str:
    """bf16, float16 or float32."""
    return "bf16" if dtype == torch.bfloat16 else str(dtype).removeprefix("torch.")
