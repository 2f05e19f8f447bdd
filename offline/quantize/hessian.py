"""The layer-wise Hessian of GPTQ, H = 2/n · XᵀX, accumulated as calibration tokens stream by."""

from __future__ import annotations

import torch

from offline.quantize.triangular import blocks
from resq_vllm.errors import ResQError


class HessianAccumulator:
    """A running sum of XᵀX over the inputs of one linear layer (or of several that share their input).

    Only the upper triangle is summed, in panels of rows: half the operations, and in float64 the memory of one
    float32 matrix.
    """

    def __init__(self, columns: int, dtype: torch.dtype = torch.float64) -> None:
        """Start at zero for inputs of ``columns`` columns.

        ``dtype`` is the sum's: float64, or float32 to halve the memory of very wide layers. Each batch's own product
        is computed in float32 either way.
        """
        self._columns = columns
        self._dtype = dtype
        self._panels: list[torch.Tensor] = []
        self._tokens = 0

    @property
    def tokens(self) -> int:
        return self._tokens

    def add(self, inputs: torch.Tensor) -> None:
        """Add ``inputs`` float [..., K], one row a token; the sum lives on the device of the first inputs.

        Raises ResQError when the width differs from the accumulator's.
        """
        if inputs.shape[-1] != self._columns:
            raise ResQError(
                f"calibration inputs have {inputs.shape[-1]} columns where the layer has {self._columns}; "
                "collect them at the same layer"
            )
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        parts = list(blocks(self._columns))
        if not self._tokens:
            self._panels = [
                torch.zeros(part.stop - part.start, self._columns - part.start, dtype=self._dtype, device=rows.device)
                for part in parts
            ]
        for part, panel in zip(parts, self._panels, strict=True):
            panel += rows[:, part].T @ rows[:, part.start :]
        self._tokens += rows.shape[0]

    def hessian(self) -> torch.Tensor:
        """H = 2/n · XᵀX, float32 [K, K], symmetric to the bit; uses up the sum.

        Raises ResQError before the first token.
        """
        if not self._tokens:
            raise ResQError("no calibration token reached this layer; give GPTQ a longer calibration text")
        tokens, self._tokens = self._tokens, 0
        result = torch.empty(self._columns, self._columns, device=self._panels[0].device)
        for part in blocks(self._columns):
            # Whole rows, so that the result's pages come into being as the panels go.
            result[part, part.start :] = self._panels.pop(0).mul_(2 / tokens)
            square = result[part, part]
            square.copy_(square.triu() + square.triu(1).T)
        for part in blocks(self._columns):
            result[part.stop :, part] = result[part, part.stop :].T
        return result


def weighted_error(weight: torch.Tensor, quantized: torch.Tensor, hessian: torch.Tensor) -> float:
    """The error that GPTQ minimises, tr(Δ·H·Δᵀ) with Δ = Ŵ − W (weights [N, K], H [K, K]), summed in float64."""
    delta = (quantized - weight).double()
    return float(((delta @ hessian.double()) * delta).sum())
