"""Weights that make up for what was lost before them.

A quantized layer's linear reads x̂, what the already quantized model before it puts out, rounded; its job is the output
that the float model's x would have given. The weight V that does it best is V = argmin Σ‖x·Wᵀ − x̂·Vᵀ‖² =
W·(XᵀX̂)·(X̂ᵀX̂)⁻¹, and GPTQ then rounds V against X̂ᵀX̂ (the asymmetric calibration of GPTAQ, arXiv 2504.02692, in
closed form). Costs a second stream of calibration activations, and nothing when serving.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from offline.finite import all_finite
from offline.models.adapter import SITE_LINEARS
from offline.models.layer import LoadedLayer, pieces
from offline.quantize.hessian import HessianAccumulator
from offline.quantize.triangular import InPlaceCholesky, blocks
from resq_vllm.errors import ResQError
from resq_vllm.formats.metadata import SITES, SiteName

# Pulls V towards W, as a share of the mean of X̂ᵀX̂'s diagonal: where calibration hardly reached, weights stay.
# Perplexity without compensation, at 1 and at 3: stories3M 7.15, 6.98, 6.99, the bundled model (means of two seeds)
# 19.59, 19.53, 19.52; at 0.2, 6.95 and 19.64.
DAMPING = 1.0


@dataclass(frozen=True)
class SiteInputs:
    """Second moments of one site's calibration inputs, float32.

    Attributes:
        hessian: H = 2/n · X̂ᵀX̂ [K, K] of what the linears will read.
        cross: C = 2/n · XᵀX̂ [K, K] with the float model's inputs X, or None.
        outputs: W·C [N, K] of all linears one under another, instead of C where that is smaller; or None. With
            neither there is nothing to make up for.

    """

    hessian: torch.Tensor
    cross: torch.Tensor | None = None
    outputs: torch.Tensor | None = None

    def compensate(self, weights: Sequence[torch.Tensor], damping: float = DAMPING) -> None:
        """Replace each W [N, K] of the site, float32, by V = W·(C + λI)·(H + λI)⁻¹; λ = ``damping`` · mean diagonal.

        The factor of H + λI, whose condition number is at most 1 + K/damping, stands in H's place meanwhile. Raises
        ResQError when the inputs are not finite.
        """
        cross = self.cross if self.outputs is None else self.outputs
        if cross is None:
            return
        if not (all_finite(self.hessian) and all_finite(cross)):
            raise ResQError("the calibration inputs hold NaN or infinite values; check the model's weights")
        mean = float(self.hessian.diagonal().mean(dtype=torch.float64))
        if not mean:  # inputs of zeros say nothing about the weights
            return
        ridge = damping * mean
        factor = InPlaceCholesky(self.hessian, ridge)
        if not factor.complete:
            raise ResQError("the calibration inputs do not determine the weights; give more calibration text")
        start = 0
        for weight in weights:
            rows = weight @ cross if self.outputs is None else cross[start : start + len(weight)]
            start += len(weight)
            weight.copy_(factor.solve_rows_(rows.add_(weight, alpha=ridge)))
        factor.restore()


class LayerInputs:
    """Streams a layer's calibration inputs site by site, beside those of the float layer."""

    def __init__(
        self,
        layer: LoadedLayer,
        hiddens: Sequence[torch.Tensor],
        float_layer: LoadedLayer | None = None,
        float_hiddens: list[torch.Tensor] | None = None,
    ) -> None:
        """``layer`` with the transforms (and roundings) that its linears will see, ``hiddens`` [B, T, d] its inputs.

        ``float_layer`` and ``float_hiddens``: the same of the float model, batch by batch, or None not to compensate;
        the states will be replaced by the layer's outputs, and to free the layer then, keep no reference to it.
        """
        self._layer, self._hiddens = layer, hiddens
        self._float_layer, self._float_hiddens = float_layer, [] if float_hiddens is None else float_hiddens

    @torch.no_grad()
    def site(self, site: SiteName, columns: int) -> SiteInputs:
        """Inputs of ``site``, ``columns`` wide, with the sites before it as they are now.

        Behind the last site the float layer is done with: its states are moved past it, and it is let go.
        """
        accumulator = HessianAccumulator(columns)
        if self._float_layer is None:
            for hidden in self._hiddens:
                self._layer.stream_inputs(pieces(hidden), site, accumulator.add)
            return SiteInputs(accumulator.hessian())
        weights = [self._layer.weight(name) for name in SITE_LINEARS[site]]
        outputs = sum(map(len, weights))
        narrow = outputs < columns
        cross = torch.zeros(
            outputs if narrow else columns, columns, dtype=torch.float64, device=self._hiddens[0].device
        )
        parts = (piece for hidden in self._hiddens for piece in pieces(hidden))
        for hidden, x in zip(parts, self._float_inputs(site), strict=True):
            if narrow:
                x = torch.cat([x @ weight.T for weight in weights], 1)
            rows: list[torch.Tensor] = []
            self._layer.stream_inputs([hidden], site, rows.append)
            x_hat = rows.pop().float()
            accumulator.add(x_hat)
            for part in blocks(x.shape[1]):
                cross[part].add_(x[:, part].T @ x_hat)
            del x, x_hat  # or they would wait for the next ones beside them
        moment = cross.mul_(2 / accumulator.tokens).float()
        del cross
        return SiteInputs(accumulator.hessian(), **{"outputs" if narrow else "cross": moment})

    @torch.no_grad()
    def finish(self) -> None:
        """Move the float states past their layer, if no site has done so."""
        if self._float_layer is not None:
            self._float_layer.run(self._float_hiddens)
            self._float_layer = None

    def _float_inputs(self, site: SiteName) -> Iterator[torch.Tensor]:
        """The float model's inputs [tokens, K] of ``site``, piece by piece."""
        layer = self._float_layer
        if layer is None:
            return
        rows: list[torch.Tensor] = []
        for position, hidden in enumerate(self._float_hiddens):
            behind: list[torch.Tensor] = []
            for piece in pieces(hidden):
                if site == SITES[-1]:
                    behind.append(layer.forward(piece, {site: rows.append}))
                else:
                    layer.stream_inputs([piece], site, rows.append)
                yield rows.pop().flatten(0, -2).float()
            if behind:
                self._float_hiddens[position] = torch.cat(behind)
        if site == SITES[-1]:
            self._float_layer = None
