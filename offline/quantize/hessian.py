"""The layer-wise Hessian of GPTQ, H = 2/n · XᵀX, accumulated as calibration tokens stream by."""

from __future__ import annotations

import torch

from resq_vllm.errors import ResQError


class HessianAccumulator:
    """A running sum of XᵀX over the inputs of one linear layer (or of several that share their input)."""

    def __init__(self, columns: int, dtype: torch.dtype = torch.float64) -> None:
        """Start at zero for inputs of ``columns`` columns.

        ``dtype`` is the sum's: float64, or float32 to halve the memory of very wide layers. Each batch's own product
        is computed in float32 either way.
        """
        self._columns = columns
        self._dtype = dtype
        self._sum: torch.Tensor | None = None
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
        if self._sum is None:
            self._sum = torch.zeros(self._columns, self._columns, dtype=self._dtype, device=rows.device)
        self._sum += rows.T @ rows
        self._tokens += rows.shape[0]

    def hessian(self) -> torch.Tensor:
        """H = 2/n · XᵀX, float32 [K, K]. Raises ResQError before the first token."""
        if self._sum is None or not self._tokens:
            raise ResQError("no calibration token reached this layer; give GPTQ a longer calibration text")
        return (self._sum * (2 / self._tokens)).float()


def weighted_error(weight: torch.Tensor, quantized: torch.Tensor, hessian: torch.Tensor) -> float:
    """The error that GPTQ minimises, tr(Δ·H·Δᵀ) with Δ = Ŵ − W (weights [N, K], H [K, K]), summed in float64."""
    delta = (quantized - weight).double()
    return float(((delta @ hessian.double()) * delta).sum())
