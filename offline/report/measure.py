"""Quantization errors of one decoder layer, before and after rotation, on a sample of calibration tokens.

"Before" takes the very same tokens back to the model's own axes, where nothing is approximated: x·U_Aᵀ times the
norm's weight for qkv and gate_up, x·U_Bᵀ per head for o_proj's input and V, H_D undone for down_proj's. Bits are those
of the site; its high columns (K and V: dims) go to the channels of largest second moment, the usual choice without a
rotation. Weights "before" are rounded to nearest: GPTQ there would need a Hessian of its own and double the time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from offline.bases.bases import LayerRotation
from offline.models.adapter import SITE_LINEARS, LinearName, ModelAdapter
from offline.models.layer import LoadedLayer, Observed, Observer
from offline.quantize.mixed import QuantizedLinear, quantize_linear
from offline.report.stats import LayerErrors, RoundingError, SiteErrors, WeightError
from resq_vllm.formats.kv_layout import KVLayout
from resq_vllm.formats.metadata import SITES, LinearSite, QuantizationMetadata, SiteName
from resq_vllm.formats.plan import HIGH, LinearPlan
from resq_vllm.hadamard import hadamard_matrix, hadamard_order, sylvester
from resq_vllm.reference import kv_fake_quantize, round_activation

# Per site the outputs are computed five times: a sample small beside any calibration set keeps that below 5 % of it.
SAMPLE_TOKENS = 1024
# Output channels at a time: errors of a whole linear would take ten times its own memory.
_ROW_CHUNK = 512
# More digits would only show in which order a machine adds.
_DIGITS = 4


def leading_tokens(batches: Sequence[torch.Tensor], limit: int = SAMPLE_TOKENS) -> list[torch.Tensor]:
    """Leading sequences of batches [B, T, …], ``limit`` tokens at most; the last one may be cut short."""
    taken: list[torch.Tensor] = []
    for batch in batches:
        rows = limit // batch.shape[1]
        if rows == 0:
            return [*taken, batch[:1, :limit]] if limit else taken
        taken.append(batch[:rows])
        limit -= taken[-1].shape[0] * batch.shape[1]
    return taken


@dataclass
class ErrorSum:
    """Σ‖x̂ − x‖² and Σ‖x‖² in float64, over as many tensors as are added."""

    error: float = 0.0
    energy: float = 0.0

    def add(self, approximation: torch.Tensor, exact: torch.Tensor) -> None:
        """Two tensors of one shape and any float type."""
        self.error += float((approximation - exact).square_().sum(dtype=torch.float64))
        self.energy += float(exact.square().sum(dtype=torch.float64))

    @property
    def relative(self) -> float:
        """The ratio, to 4 digits; 0 for all zeros that stay zeros."""
        return float(f"{self.error / self.energy:.{_DIGITS}g}") if self.energy else 0.0


def relative_error(approximation: torch.Tensor, exact: torch.Tensor) -> float:
    """‖x̂ − x‖²/‖x‖²."""
    total = ErrorSum()
    total.add(approximation, exact)
    return total.relative


def undo_hadamard(x: torch.Tensor, groups: int) -> torch.Tensor:
    """x·H_D for x [..., f] that went through x·H_Dᵀ (:func:`offline.rotate.fuse.rotate_rows`), in x's dtype."""
    if groups == 0:
        return x
    n = x.shape[-1] // groups
    k = hadamard_order(n)
    left, right = hadamard_matrix(k).to(x), sylvester(n // k).to(x)
    # H_{2^m} is symmetric; H_k (Paley I) is not.
    return (left.T @ x.reshape(*x.shape[:-1], groups, k, n // k) @ right / n**0.5).reshape(x.shape)


def largest_last(plan: LinearPlan, moment: torch.Tensor) -> torch.Tensor:
    """A permutation int64 [K] of columns that gives the plan's high places to those of largest second moment [K].

    Columns stay inside their head, or scale block, where the plan has high places in each.
    """
    pieces: list[torch.Tensor] = []
    start = end = 0
    for segment in plan.segments:
        end += segment.columns
        if segment.part == HIGH:
            pieces.append(start + moment[start:end].argsort(stable=True))
            start = end
    pieces.append(torch.arange(start, end, device=moment.device))
    return torch.cat(pieces)


def kv_errors(
    key: torch.Tensor, value: torch.Tensor, layout: KVLayout, rotation: LayerRotation
) -> tuple[RoundingError, RoundingError]:
    """Errors of K and of V, both [kv, T, hd] of the rotated layer: k after RoPE without U_C, v with U_B in it."""
    u_c, u_b = rotation.key.to(key), rotation.value.to(value)
    own = value @ u_b.mT
    key_order = key.square().mean((0, 1)).argsort(stable=True)
    value_order = own.square().mean(1).argsort(stable=True)
    sorted_key = key[..., key_order]
    sorted_value = own.gather(2, value_order[:, None].expand_as(own))

    def error(x: torch.Tensor) -> float:
        return relative_error(kv_fake_quantize(x, layout).to(x), x)

    return (
        RoundingError(before=error(sorted_key), after=error(key @ u_c)),
        RoundingError(before=error(sorted_value), after=error(value)),
    )


class SiteMeasurement:
    """Sums the errors of one site over its linears."""

    def __init__(self, rotated: torch.Tensor, own: torch.Tensor, site: LinearSite, plan: LinearPlan) -> None:
        """``rotated`` [T, K]: the input after its online transform; ``own`` [T, K]: the same in the model's axes."""
        self._site = site
        # The online Hadamard is part of the rotation: without it, its blocks remain as scale blocks.
        self._own_plan = replace(plan, hadamard_groups=0)
        self._order = largest_last(plan, own.square().mean(0))
        self._rotated, self._own = rotated, own[:, self._order]
        self._rotated_rounded = round_activation(rotated, plan)
        self._own_rounded = round_activation(self._own, self._own_plan)
        self._weight = [ErrorSum() for _ in range(3)]
        self._output = [ErrorSum() for _ in range(3)]

    def add(self, own: torch.Tensor, fused: torch.Tensor, stored: QuantizedLinear, nearest: bool) -> None:
        """One linear: its own and its fused weight [N, K], and what is stored; ``nearest``: stored without GPTQ."""
        for start in range(0, fused.shape[0], _ROW_CHUNK):
            rows = slice(start, start + _ROW_CHUNK)
            self._add(own[rows].float()[:, self._order], fused[rows], stored.part(rows), nearest)

    def _add(self, own: torch.Tensor, fused: torch.Tensor, stored: QuantizedLinear, nearest: bool) -> None:
        own_value, kept = self._nearest(own), stored.dequantize()
        # The clip search saw these same weights, so its scales serve for rounding to nearest as well.
        rotated = kept if nearest else stored.nearest(fused).dequantize()
        for total, value, exact in zip(self._weight, (own_value, rotated, kept), (own, fused, fused), strict=True):
            total.add(value, exact)
        self._output[0].add(self._own_rounded @ own_value.T, self._own @ own.T)
        exact, served = self._rotated @ fused.T, self._rotated_rounded @ kept.T
        self._output[1].add(served if nearest else self._rotated_rounded @ rotated.T, exact)
        self._output[2].add(served, exact)

    def errors(self) -> SiteErrors:
        """Of all linears added."""
        weight, output = ([total.relative for total in sums] for sums in (self._weight, self._output))
        return SiteErrors(
            activation=RoundingError(
                before=relative_error(self._own_rounded, self._own),
                after=relative_error(self._rotated_rounded, self._rotated),
            ),
            weight=WeightError(before=weight[0], rotated=weight[1], after=weight[2]),
            output=WeightError(before=output[0], rotated=output[1], after=output[2]),
        )

    def _nearest(self, own: torch.Tensor) -> torch.Tensor:
        bits = self._site.weight_low_bits, self._site.weight_high_bits
        return quantize_linear(own, None, self._own_plan, *bits).dequantize()


@dataclass
class LayerMeasurement:
    """Watches one layer while it is quantized: :meth:`observe` first, then :meth:`linear` for each quantized linear.

    Attributes:
        adapter: names and sizes.
        metadata: of the checkpoint.
        plans: of the sites, all ranks.
        index: the layer.
        original: its tensors before fusion, by full name; a weight is dropped when it has been looked at.
        rotation: U_A, U_B and U_C.

    """

    adapter: ModelAdapter
    metadata: QuantizationMetadata
    plans: Mapping[SiteName, LinearPlan]
    index: int
    original: dict[str, torch.Tensor]
    rotation: LayerRotation
    _inputs: dict[SiteName, torch.Tensor] = field(default_factory=dict)
    _current: tuple[SiteName, SiteMeasurement] | None = None
    _errors: dict[SiteName, SiteErrors] = field(default_factory=dict)
    _cache: tuple[RoundingError | None, RoundingError | None] = (None, None)

    def observe(self, layer: LoadedLayer, hiddens: Sequence[torch.Tensor]) -> None:
        """Run the fused, unquantized layer on the first tokens of ``hiddens`` [B, T, d] and keep what sites read."""
        seen: dict[Observed, list[torch.Tensor]] = {}

        def keep(name: Observed, x: torch.Tensor) -> None:
            seen.setdefault(name, []).append(x)

        def tokens(name: Observed) -> Observer:
            return lambda x: keep(name, x.flatten(0, 1))

        def heads(name: Observed) -> Observer:
            # [B, kv, T, hd] -> [kv, B·T, hd]
            return lambda x: keep(name, x.transpose(0, 1).flatten(1, 2))

        sites = [s for s in SITES if self.adapter.linear(self.index, SITE_LINEARS[s][0]) not in self.metadata.ignore]
        observers: dict[Observed, Observer] = {site: tokens(site) for site in sites}
        cache = self.metadata.kv_cache[self.index]
        if cache.low_bits != 16:
            observers |= {"key": heads("key"), "value": heads("value")}
        for hidden in leading_tokens(hiddens):
            layer.forward(hidden, observers)
        self._inputs = {site: torch.cat(seen[site]) for site in sites}
        if cache.low_bits != 16:
            layout = KVLayout(self.metadata.head_dim, cache.high, cache.low_bits)
            key, value = (torch.cat(seen[name], 1) for name in ("key", "value"))
            self._cache = kv_errors(key, value, layout, self.rotation)

    def linear(
        self, site: SiteName, name: LinearName, fused: torch.Tensor, stored: QuantizedLinear, nearest: bool
    ) -> None:
        """One quantized linear, sites in order.

        ``fused``: the weight that was rounded (with compensation, what that asks for); ``nearest``: without GPTQ.
        """
        if self._current is None or self._current[0] != site:
            self._finish()
            x = self._inputs.pop(site)
            own = self.own_input(site, x)
            self._current = site, SiteMeasurement(x, own, self.metadata.sites[site], self.plans[site])
        own_weight = self.original.pop(self.adapter.linear(self.index, name) + ".weight").to(fused.device)
        self._current[1].add(own_weight, fused, stored, nearest)

    def errors(self) -> LayerErrors:
        """Of the whole layer."""
        self._finish()
        key, value = self._cache
        return LayerErrors(sites=self._errors, key=key, value=value)

    def own_input(self, site: SiteName, x: torch.Tensor) -> torch.Tensor:
        """A site's input [T, K] of the rotated layer in the model's own axes, its norm's weight included."""
        if site in ("qkv", "gate_up"):
            gamma = self.original[self.adapter.norm(self.index, "input" if site == "qkv" else "post")]
            return x @ self.rotation.residual.to(x).T * gamma.to(x)
        if site == "o":
            heads = x.view(-1, self.adapter.num_kv_heads, self.adapter.heads_per_kv, self.adapter.head_dim)
            return (heads @ self.rotation.value.to(x).mT).flatten(1)
        return undo_hadamard(x, self.metadata.sites["down"].hadamard_groups)

    def _finish(self) -> None:
        if self._current is not None:
            site, measurement = self._current
            self._errors[site] = measurement.errors()
            self._current = None
