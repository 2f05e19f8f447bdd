"""ResQ: PCA bases with a high-precision subspace, random rotations inside it and its complement, and its variations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import ClassVar, Literal

import torch

from offline.bases.bases import BasisKind, Rotations, Site
from offline.methods.lab import Lab
from offline.methods.method import FLOAT_BITS, LayerPlan, Method, Prepared, SiteQuantization
from offline.methods.plans import planned_site
from offline.methods.rotated import RotatedPrepared
from offline.pipeline.options import OutputScales
from offline.pipeline.sites import build_down_layout, build_kv_layers, build_sites
from offline.quantize.activations import KVQuantizer
from offline.quantize.lm_head import OutputHead, quantize_lm_head, reads_calibration
from offline.quantize.rounding import round_columns
from offline.rotate.channels import order_down
from offline.rotate.fuse import fuse_layer, fuse_lm_head
from offline.rotate.train import TrainOptions, train_rotations
from offline.rotate.trainable import RotationBlocks
from resq_vllm.formats.kv_layout import KVLayout
from resq_vllm.formats.metadata import SITES, LMHeadBits, SiteName, head_site, high_count
from resq_vllm.formats.plan import LOW, LinearPlan, Segment, linear_plan

HIGH_BITS = 8
TABLE_BITS = 4


@dataclass(frozen=True)
class ResQ(Method):
    """Defaults: what ``resq quantize`` does. Every field is an ablation.

    Attributes:
        high_fraction: share of the channels (and of a head's dims) at 8 bits.
        low_bits: of the others; 2 and 3 have no kernel and are for measuring only.
        lowest_fraction: share of the channels with the least variance at 2 bits (the paper's three-way split).
        o_scales: which of o_proj's inputs share an activation scale (see ``resq quantize --help``).
        down_act_bits: of down_proj's input; None: as ``low_bits``.
        down_high_fraction: share of down_proj's channels, the strongest, at 8 bits (the paper: none); None: as
            ``high_fraction``.
        kv_bits: 4, 8 or 16 for all layers, or one entry a layer.
        lm_head_bits: 16; 8 for its weights and inputs; or 4, its high columns and inputs at 8.
        compensate: weights make up for what the rounded model lost before them (:mod:`offline.quantize.compensate`).
        rtn: round weights to nearest.
        basis: of U_A, U_B and U_C: "pca", "random" or "identity".
        random_rotation: rotate inside the subspaces.
        hadamard: rotate down_proj's input (U_D).
        max_tp: largest tensor-parallel degree.
        down_groups: activation scale groups of down_proj's input, where its width and ``max_tp`` allow.
        calibration_samples: sequences to calibrate on, None for all.

    """

    high_fraction: float = 0.125
    low_bits: int = 4
    lowest_fraction: float = 0.0
    o_scales: OutputScales = "part"
    down_act_bits: Literal[4, 8] | None = None
    down_high_fraction: float | None = None
    kv_bits: tuple[Literal[4, 8, 16], ...] = (4,)
    lm_head_bits: LMHeadBits = 16
    compensate: bool = True
    rtn: bool = False
    residual_basis: BasisKind = "pca"
    value_basis: BasisKind = "pca"
    key_basis: BasisKind = "pca"
    random_rotation: bool = True
    hadamard: bool = True
    max_tp: int = 8
    down_groups: int = 8
    calibration_samples: int | None = None
    name: str = "resq"
    label: str = "ResQ"
    source: str = "arXiv 2412.14363, with the choices of docs/accuracy.md"

    _WORDS: ClassVar[tuple[str, ...]] = ("name", "label", "source")

    def settings(self) -> dict[str, object]:
        return {key: value for key, value in asdict(self).items() if key not in self._WORDS}

    @property
    def samples(self) -> int | None:
        return self.calibration_samples

    @property
    def compensates(self) -> bool:
        return self.compensate and not self.rtn

    def rotations(self, lab: Lab) -> Rotations:
        """U_A, U_B and U_C."""
        kinds: Mapping[Site, BasisKind] = {
            "residual": self.residual_basis,
            "value": self.value_basis,
            "key": self.key_basis,
        }
        adapter = lab.adapter
        return lab.bases(kinds).compose(
            high_count(adapter.hidden_size, self.high_fraction),
            high_count(adapter.head_dim, self.high_fraction),
            lab.seed,
            self.random_rotation,
            high_count(adapter.hidden_size, self.lowest_fraction),
            high_count(adapter.head_dim, self.lowest_fraction),
        )

    def prepare(self, lab: Lab) -> Prepared:
        return ResQPrepared(lab, self, self.rotations(lab))


class ResQPrepared(RotatedPrepared):
    """A model fused with the bases, sites as the checkpoint's metadata would say."""

    def __init__(self, lab: Lab, method: ResQ, rotations: Rotations) -> None:
        super().__init__(lab, rotations)
        self._method = method
        self._layout = build_down_layout(self.adapter, method)
        self._energy = lab.bases().down_energy
        self.sites = _sites(lab, method)
        self._kv = build_kv_layers(self.adapter, method)
        width = self.adapter.hidden_size
        self._head_site = head_site(method.lm_head_bits, width, high_count(width, method.high_fraction))

    def head(self, hessian: Callable[[], torch.Tensor]) -> OutputHead:
        site = self._head_site
        if site is None:
            return super().head(hessian)
        norm, residual = self.source.final_norm(), self.rotations.residual
        moments = hessian() if reads_calibration(site, self._method.rtn) else None
        head = quantize_lm_head(self.source.lm_head(), site, moments, lambda rows: fuse_lm_head(rows, norm, residual))
        return OutputHead.of_quantized(self.final_norm(), head)

    @property
    def hadamard_groups(self) -> int:
        """Blocks of the online Hadamard before down_proj."""
        return self._layout.hadamard_groups if self._method.hadamard else 0

    def ordered(self, index: int) -> Mapping[str, torch.Tensor]:
        """The model's own layer, with down_proj's channels in order."""
        return order_down(self.source.layer_tensors(index), self.adapter, index, self._energy[index], self._layout)

    def kv(self, index: int) -> KVQuantizer:
        """What K and V of a layer go through."""
        kv, head_dim = self._kv[index], self.adapter.head_dim
        if kv.low_bits == FLOAT_BITS:
            return KVQuantizer()
        rotation = self.rotations.layer(index).key
        low_bits = kv.low_bits if kv.low_bits == HIGH_BITS else self._method.low_bits
        lowest = high_count(head_dim, self._method.lowest_fraction)
        if low_bits in (TABLE_BITS, HIGH_BITS) and not lowest:
            return KVQuantizer.of_layout(KVLayout(head_dim, kv.high, low_bits), rotation)
        columns = [slice(0, lowest), slice(lowest, head_dim - kv.high), slice(head_dim - kv.high, head_dim)]
        parts = [(c, b) for c, b in zip(columns, (2, low_bits, HIGH_BITS), strict=True) if c.stop > c.start]
        chosen, bits = [c for c, _ in parts], [b for _, b in parts]
        return KVQuantizer(
            rotation.float(), lambda x: round_columns(x, chosen, bits), lambda x: round_columns(x, chosen, bits)
        )

    def kv_bits(self, index: int) -> float:
        """Mean bits of an element of K or V."""
        kv, head_dim = self._kv[index], self.adapter.head_dim
        if kv.low_bits in (HIGH_BITS, FLOAT_BITS):
            return float(kv.low_bits)
        lowest = high_count(head_dim, self._method.lowest_fraction)
        low = head_dim - kv.high - lowest
        return (2 * lowest + self._method.low_bits * low + HIGH_BITS * kv.high) / head_dim

    def layer(self, index: int) -> LayerPlan:
        rotation = self.rotations.layer(index)
        tensors = fuse_layer(self.ordered(index), self.adapter, index, rotation, self.hadamard_groups)
        return LayerPlan(tensors, self.sites, self.kv(index), self.kv_bits(index))


def _sites(lab: Lab, method: ResQ) -> dict[SiteName, SiteQuantization]:
    sites: dict[SiteName, SiteQuantization] = {}
    bits = (method.low_bits, HIGH_BITS)
    for name, site in build_sites(lab.adapter, method).items():
        plan = linear_plan(site, site.low + site.high, lab.adapter.head_dim)
        if not method.hadamard:
            plan = replace(plan, hadamard_groups=0)
        plan = replace(plan, group_bits=tuple(method.low_bits if b == TABLE_BITS else b for b in plan.group_bits))
        weight_bits: tuple[int, ...] = bits
        if method.lowest_fraction and name != "down":
            plan, weight_bits = three_way(plan, method.lowest_fraction), (2, *bits)
        sites[name] = planned_site(plan, weight_bits, not method.rtn)
    return {site: sites[site] for site in SITES}


def three_way(plan: LinearPlan, lowest_fraction: float) -> LinearPlan:
    """Every low segment split into [2 bits | the rest]: parts 0 (2 bits), 1 (low), 2 (high)."""
    unit = sum(s.columns for s in plan.segments[: 1 + max(s.part for s in plan.segments)])
    lowest = high_count(unit, lowest_fraction)
    groups = len(plan.group_bits)
    segments: list[Segment] = []
    bits = list(plan.group_bits)
    added: dict[int, int] = {}
    for segment in plan.segments:
        if segment.part == LOW and lowest:
            group = added.setdefault(segment.group, groups + len(added))
            if group == len(bits):
                bits.append(2)
            segments.append(Segment(lowest, 0, group))
            segment = Segment(segment.columns - lowest, segment.part, segment.group)
        segments.append(Segment(segment.columns, segment.part + 1, segment.group))
    return LinearPlan(tuple(segments), tuple(bits), plan.hadamard_groups)


@dataclass(frozen=True)
class TrainedResQ(ResQ):
    """ResQ whose rotations are trained by Cayley SGD, each inside its subspace, starting from the random ones."""

    train_tokens: int = 65_536
    lr: float = 1.5
    name: str = "resq-trained"
    label: str = "ResQ, trained rotations"

    def prepare(self, lab: Lab) -> Prepared:
        initial = ResQPrepared(lab, self, self.rotations(lab))
        adapter = lab.adapter
        trained = train_rotations(
            lab.runner,
            lab.calibration,
            initial.rotations,
            RotationBlocks(
                _widths(adapter.hidden_size, self.lowest_fraction, self.high_fraction),
                _widths(adapter.head_dim, self.lowest_fraction, self.high_fraction),
            ),
            {site: plan.activation for site, plan in initial.sites.items()},
            [initial.kv(index) for index in range(adapter.num_layers)],
            initial.hadamard_groups,
            TrainOptions(self.train_tokens, lr=self.lr, seed=lab.seed),
            lambda done, total, loss: lab.progress(f"{self.name} training (loss {loss:.3f})", done, total),
            layer_tensors=initial.ordered,
        )
        return ResQPrepared(lab, self, trained)


def _widths(dim: int, lowest_fraction: float, high_fraction: float) -> tuple[int, ...]:
    lowest, high = high_count(dim, lowest_fraction), high_count(dim, high_fraction)
    return lowest, dim - lowest - high, high
