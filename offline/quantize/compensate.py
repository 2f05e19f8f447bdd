"""Weights that make up for what was lost before them.

A quantized layer's linear reads x̂, what the already quantized model before it puts out, rounded; its job is the output
that the float model's x would have given. The weight V that does it best is V = argmin Σ‖x·Wᵀ − x̂·Vᵀ‖² =
W·(XᵀX̂)·(X̂ᵀX̂)⁻¹, and GPTQ then rounds V against X̂ᵀX̂ (the asymmetric calibration of GPTAQ, arXiv 2504.02692, in
closed form). Costs a second stream of calibration activations, and nothing when serving.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from offline.models.layer import LoadedLayer
from offline.quantize.hessian import HessianAccumulator
from resq_vllm.errors import ResQError
from resq_vllm.formats.metadata import SiteName

# Pulls V towards W, as a share of the mean of X̂ᵀX̂'s diagonal: where calibration hardly reached, weights stay.
# Perplexity without compensation, at 1 and at 3: stories3M 7.15, 6.98, 6.99, the bundled model (means of two seeds)
# 19.59, 19.53, 19.52; at 0.2, 6.95 and 19.64.
DAMPING = 1.0


@dataclass(frozen=True)
class SiteInputs:
    """Second moments of one site's calibration inputs, float32 [K, K].

    Attributes:
        hessian: 2/n · X̂ᵀX̂ of what the linears will read.
        cross: 2/n · XᵀX̂ with the float model's inputs X, or None where there is nothing to make up for.

    """

    hessian: torch.Tensor
    cross: torch.Tensor | None = None

    def compensation(self, damping: float = DAMPING) -> Compensation | None:
        """What turns W into V, or None for V = W. Raises ResQError when the inputs are not finite."""
        if self.cross is None:
            return None
        if not bool(torch.isfinite(self.hessian).all() and torch.isfinite(self.cross).all()):
            raise ResQError("the calibration inputs hold NaN or infinite values; check the model's weights")
        ridge = damping * float(self.hessian.diagonal().mean(dtype=torch.float64))
        return Compensation(_damped(self.cross, ridge), torch.linalg.cholesky(_damped(self.hessian, ridge)))


@dataclass(frozen=True)
class Compensation:
    """V = W·(C + λI)·(H + λI)⁻¹ for every linear of a site.

    Attributes:
        cross: C + λI float32 [K, K].
        lower: Cholesky factor of H + λI, float32 [K, K]: λ bounds its condition number by 1 + K/damping.

    """

    cross: torch.Tensor
    lower: torch.Tensor

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        """V float32 [N, K] of W [N, K]."""
        return torch.cholesky_solve((weight.float() @ self.cross).T, self.lower).T.contiguous()


def _damped(matrix: torch.Tensor, ridge: float) -> torch.Tensor:
    result = matrix.clone()
    result.diagonal().add_(ridge)
    return result


class LayerInputs:
    """Streams a layer's calibration inputs site by site, beside those of the float layer."""

    def __init__(
        self,
        layer: LoadedLayer,
        hiddens: Sequence[torch.Tensor],
        float_layer: LoadedLayer | None = None,
        float_hiddens: Sequence[torch.Tensor] = (),
    ) -> None:
        """``layer`` with the transforms (and roundings) that its linears will see, ``hiddens`` [B, T, d] its inputs.

        ``float_layer`` and ``float_hiddens``: the same of the float model, batch by batch, or None not to compensate.
        """
        self._layer, self._hiddens = layer, hiddens
        self._float_layer, self._float_hiddens = float_layer, float_hiddens

    def site(self, site: SiteName, columns: int) -> SiteInputs:
        """Inputs of ``site``, ``columns`` wide, with the sites before it as they are now."""
        accumulator = HessianAccumulator(columns)
        if self._float_layer is None:
            self._layer.stream_inputs(self._hiddens, site, accumulator.add)
            return SiteInputs(accumulator.hessian())
        cross = torch.zeros(columns, columns, dtype=torch.float64, device=self._hiddens[0].device)
        for hidden, reference in zip(self._hiddens, self._float_hiddens, strict=True):
            rows: list[torch.Tensor] = []
            self._layer.stream_inputs([hidden], site, rows.append)
            self._float_layer.stream_inputs([reference], site, rows.append)
            accumulator.add(rows[0])
            cross += rows[1].float().T @ rows[0].float()
        return SiteInputs(accumulator.hessian(), (cross * (2 / accumulator.tokens)).float())
