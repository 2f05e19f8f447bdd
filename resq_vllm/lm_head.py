"""``ResQLMHeadMethod``: lm_head at 8 bits, one ``ops.linear_planned`` call on this rank's rows of the vocabulary."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from resq_vllm.errors import ResQError
from resq_vllm.formats.plan import LinearPlan
from resq_vllm.linear import ResQLinearMethod
from resq_vllm.vllm_api import LinearBase, ParallelLMHead

if TYPE_CHECKING:
    from resq_vllm.config import ResQConfig


class ResQLMHeadMethod(ResQLinearMethod):
    """lm_head as a linear layer of 8-bit columns alone; vLLM's logits processor calls :meth:`apply`.

    vLLM pads the vocabulary to a multiple of 64 and deals it to the ranks; its loader cuts every rank's rows out of the
    checkpoint's tensors and fills up with zeros, codes and scales alike, so padding gets the logit 0 that a 16-bit head
    gives it, and is cut off after the gather.
    """

    def __init__(self, config: ResQConfig) -> None:
        site = config.metadata.lm_head_site
        if site is None:
            raise ResQError("lm_head is in 16 bits in this checkpoint; quantize the model with --lm-head-bits 8")
        super().__init__(config, site)

    def tally(self, plan: LinearPlan, outputs: int, modules: int) -> None:
        """Say in the start-up line that the head is quantized; its bits are not those of the decoder's linears."""
        self.config.lm_head = f"W{self.site.weight_high_bits}A{self.site.act_high_bits}"

    def tie_weights(self, layer: LinearBase, embed_tokens: torch.nn.Module) -> LinearBase:
        """vLLM's request to share the embedding's rows. Raises ResQError: an 8-bit head has rows of its own."""
        raise ResQError(
            f"{layer.prefix}: an 8-bit lm_head cannot share the embedding's weights; set tie_word_embeddings to false "
            "in config.json"
        )


def is_lm_head(layer: torch.nn.Module, prefix: str) -> bool:
    """Whether ``layer`` is the model's lm_head (and not a draft model's or the embedding)."""
    return isinstance(layer, ParallelLMHead) and prefix.rpartition(".")[2] == "lm_head"


def float_name(dtype: torch.dtype) -> str:
    """bf16, float16 or float32."""
    return "bf16" if dtype == torch.bfloat16 else str(dtype).removeprefix("torch.")
