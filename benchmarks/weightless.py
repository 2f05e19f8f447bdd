"""vLLM's engine around a model of full size without weights: what an engine occupies beside them.

Every linear layer, the embedding and lm_head answer zeros of the right shape through an op that torch.compile cannot
look into, so graph, compiled code, activations and vLLM's buffers are those of the same model with weights.
"""

from __future__ import annotations

from typing import Any

import torch

from resq_vllm.vllm_api import (
    LinearBase,
    LinearMethodBase,
    QuantizationConfig,
    VocabParallelEmbedding,
    register_quantization_config,
)

QUANT_METHOD = "weightless"


@torch.library.custom_op("resq_benchmarks::weightless", mutates_args=())
def zeros(x: torch.Tensor, outputs: int, dtype: torch.dtype) -> torch.Tensor:
    """x [..., K] -> zeros [..., outputs]."""
    return x.new_zeros((*x.shape[:-1], outputs), dtype=dtype)


@zeros.register_fake
def _zeros_fake(x: torch.Tensor, outputs: int, dtype: torch.dtype) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], outputs), dtype=dtype)


class WeightlessMethod(LinearMethodBase):
    """A linear layer or embedding that has no parameters."""

    def create_weights(
        self,
        layer: LinearBase,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        layer.weightless = input_size_per_partition, sum(output_partition_sizes), params_dtype

    def apply(self, layer: LinearBase, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., K] -> zeros [..., N] of this rank."""
        _, outputs, dtype = layer.weightless
        return zeros(x, outputs, dtype)

    def embedding(self, layer: VocabParallelEmbedding, tokens: torch.Tensor) -> torch.Tensor:
        """tokens [...] -> zeros [..., hidden]."""
        hidden, _, dtype = layer.weightless
        return zeros(tokens.unsqueeze(-1), hidden, dtype)


class WeightlessConfig(QuantizationConfig):
    """``quant_method: weightless``. vLLM pickles it to its workers, which import this module by that."""

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> WeightlessConfig:
        return cls()

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> WeightlessMethod | None:
        return WeightlessMethod() if isinstance(layer, LinearBase | VocabParallelEmbedding) else None


register_quantization_config(QUANT_METHOD)(WeightlessConfig)
