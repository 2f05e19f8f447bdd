"""lm_head in 8 bits, or in 4 with 8-bit columns: symmetric weights with a scale a row and part, inputs in 8 bits.

At 8 bits it is rounded to nearest at the row's full range, which moves perplexity by 0.09 % at most; a clip search
would lower the squared error by 3 %. With 4-bit columns it is quantized as every other linear layer, by GPTQ with a
clip search: perplexity grows by 0.93 % (stories3M) and 0.40 % (the bundled model); to nearest by 1.83 and 0.69 %, with
either of the two alone by something between (means of two seeds, docs/accuracy.md). The search takes 0.5 s a million
weights: minutes for a vocabulary of 128k.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from offline.models.layer import pieces
from offline.models.runner import LayerRunner
from offline.quantize.activations import ActivationQuantizer, Transform, identity
from offline.quantize.gptq import factorise
from offline.quantize.hessian import HessianAccumulator
from offline.quantize.mixed import QuantizedLinear, quantize_linear
from resq_vllm.formats.metadata import LM_HEAD, LinearSite
from resq_vllm.formats.plan import linear_plan

# Rows in float32 at a time: the whole table would be twice the model's own, and GPTQ holds three such copies.
ROW_CHUNK = 4096


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


def reads_calibration(site: LinearSite | None, rtn: bool) -> bool:
    """Whether a head of ``site`` (None: not quantized) is rounded by GPTQ: 4-bit columns, unless ``rtn`` is asked."""
    return site is not None and site.low > 0 and not rtn


def head_hessian(runner: LayerRunner, norm: torch.Tensor, hiddens: Sequence[torch.Tensor]) -> torch.Tensor:
    """H = 2/n · XᵀX float32 [d, d] of lm_head's input, unrounded: its 8 bits would not be seen in the sum.

    norm: weight of the final RMSNorm [d]; hiddens: the last layer's outputs [B, T, d], batch by batch. Raises ResQError
    without a token.
    """
    accumulator = HessianAccumulator(len(norm))
    for hidden in hiddens:
        for piece in pieces(hidden):
            accumulator.add(runner.head_input(piece, norm))
    return accumulator.hessian()


def quantize_lm_head(
    table: torch.Tensor,
    site: LinearSite,
    hessian: torch.Tensor | None = None,
    fused: Callable[[torch.Tensor], torch.Tensor] = identity,
    progress: Callable[[int, int], None] | None = None,
) -> QuantizedLinear:
    """lm_head [vocab, d] as ``site`` says.

    ``hessian`` [d, d] of its input, whose memory is taken, or None to round to nearest; ``fused`` takes any of the
    table's rows [n, d] to those that are rounded (final norm folded in, rotated); ``progress`` is told how many rows
    are done, and of how many. Raises ResQError for weights or a Hessian that are not finite.
    """
    columns = site.low + site.high
    plan = linear_plan(site, columns, columns)
    device = table.device if hessian is None else hessian.device
    factor = None if hessian is None else factorise(hessian, plan, name=LM_HEAD, consume=True)
    bits, clip = (site.weight_low_bits, site.weight_high_bits), site.low > 0
    parts, done = [], 0
    for rows in table.split(ROW_CHUNK):
        parts.append(quantize_linear(fused(rows).to(device), factor, plan, *bits, clip, LM_HEAD))
        done += len(rows)
        if progress:
            progress(done, len(table))
    return replace(
        parts[0],
        low=torch.cat([part.low for part in parts]),
        high=torch.cat([part.high for part in parts]),
        low_scale=torch.cat([part.low_scale for part in parts]),
        high_scale=torch.cat([part.high_scale for part in parts]),
    )
