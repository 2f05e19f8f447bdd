"""lm_head at 8 bits: symmetric weights with a scale a row, inputs asymmetric with a scale a token.

Rounded to nearest at the row's full range, which moves perplexity by 0.04 % at most (docs/accuracy.md). A clip search
would lower the squared error of a randomly rotated head by another 3 %, and takes 0.5 s a million weights: minutes for
a vocabulary of 128k.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from offline.quantize.activations import ActivationQuantizer, Transform, identity
from offline.quantize.mixed import QuantizedLinear, quantize_linear
from resq_vllm.formats.metadata import LM_HEAD, eight_bit_head
from resq_vllm.formats.plan import linear_plan

# Rows in float32 at a time: the whole table would be twice the model's own.
ROW_CHUNK = 16384


@dataclass(frozen=True)
class OutputHead:
    """What follows the last decoder layer: logits = rounding(norm(x))·Wᵀ.

    Attributes:
        norm: weight of the final RMSNorm [d].
        weight: lm_head [vocab, d] of any float type, dequantized where it is quantized.
        rounding: of lm_head's input.

    """

    norm: torch.Tensor
    weight: torch.Tensor
    rounding: Transform = identity

    @classmethod
    def of_quantized(cls, norm: torch.Tensor, linear: QuantizedLinear) -> OutputHead:
        """As it will be served."""
        return cls(norm, linear.dequantize(), ActivationQuantizer.of_plan(linear.plan))


def quantize_lm_head(table: torch.Tensor, fused: Callable[[torch.Tensor], torch.Tensor] = identity) -> QuantizedLinear:
    """lm_head [vocab, d] in 8 bits.

    ``fused`` takes any of its rows [n, d] to those that are rounded (final norm folded in, rotated). Raises ResQError
    for weights that are not finite.
    """
    columns = table.shape[1]
    plan = linear_plan(eight_bit_head(columns), columns, columns)
    parts = [quantize_linear(fused(rows), None, plan, clip=False, name=LM_HEAD) for rows in table.split(ROW_CHUNK)]
    return replace(
        parts[0],
        low=torch.cat([part.low for part in parts]),
        high=torch.cat([part.high for part in parts]),
        low_scale=torch.cat([part.low_scale for part in parts]),
        high_scale=torch.cat([part.high_scale for part in parts]),
    )
