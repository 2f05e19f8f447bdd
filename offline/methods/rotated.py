"""Uniform bits after a fixed or trained rotation: QuaRot and SpinQuant."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from offline.bases.bases import Rotations
from offline.bases.hadamard import normalised_hadamard, random_hadamard
from offline.methods.lab import Lab
from offline.methods.method import LayerPlan, Method, Prepared, SiteQuantization
from offline.methods.plain import site_width
from offline.methods.plans import planned_site, uniform_kv, uniform_plan
from offline.models.adapter import ModelAdapter
from offline.quantize.activations import Transform
from offline.rotate.fuse import fuse_embedding, fuse_layer, fuse_lm_head, rotate_rows
from offline.rotate.train import TrainOptions, train_rotations
from offline.rotate.trainable import RotationBlocks
from resq_vllm.errors import ResQError
from resq_vllm.formats.metadata import SITES, SiteName
from resq_vllm.hadamard import hadamard_order


class RotatedPrepared(Prepared):
    """A model fused with ``rotations`` whose embedding, final norm and lm_head are rotated likewise."""

    def __init__(self, lab: Lab, rotations: Rotations) -> None:
        super().__init__(lab.source)
        self.adapter: ModelAdapter = lab.adapter
        self.rotations = rotations.to(lab.runner.device)

    def embedding(self) -> torch.Tensor:
        return fuse_embedding(self.source.embedding(), self.rotations.residual, self.source.dtype)

    def final_norm(self) -> torch.Tensor:
        return torch.ones_like(self.source.final_norm())

    def lm_head(self) -> torch.Tensor:
        norm = self.source.final_norm()
        return fuse_lm_head(self.source.lm_head(), norm, self.rotations.residual, self.source.dtype)


def hadamard_rotations(adapter: ModelAdapter, seed: int) -> Rotations:
    """Random Hadamard for the residual stream, one Hadamard of head_dim for every V and K (QuaRot, section 4)."""
    layers, kv, hd = adapter.num_layers, adapter.num_kv_heads, adapter.head_dim
    head = random_hadamard(hd, seed, "head")
    residual = random_hadamard(adapter.hidden_size, seed, "residual")
    return Rotations(residual, head.expand(layers, kv, hd, hd).clone(), head.expand(layers, hd, hd).clone(), 0, 0)


def down_groups(adapter: ModelAdapter) -> int:
    """Blocks of the Hadamard before down_proj: one of full width, or the fewest whose width has a known order."""
    width = adapter.intermediate_size
    for groups in range(1, width + 1):
        if width % groups == 0 and _has_order(width // groups):
            return groups
    raise ResQError(f"intermediate_size {width} has no block Hadamard")


def head_mixing(adapter: ModelAdapter) -> Transform | None:
    """QuaRot's online Hadamard over the head index of o_proj's input, or None where that number has no known order."""
    heads, hd = adapter.num_heads, adapter.head_dim
    if not _has_order(heads):
        return None
    matrix = normalised_hadamard(heads).float()

    def mix(x: torch.Tensor) -> torch.Tensor:
        by_head = x.unflatten(-1, (heads, hd))
        return torch.einsum("gh,...hd->...gd", matrix.to(x), by_head).flatten(-2)

    return mix


def _has_order(n: int) -> bool:
    try:
        return hadamard_order(n) > 0
    except ResQError:
        return False


def uniform_rotated_sites(
    adapter: ModelAdapter, bits: int, groups: int, mix: Transform | None = None
) -> dict[SiteName, SiteQuantization]:
    """``bits`` everywhere; the Hadamard of ``groups`` blocks before down_proj, ``mix`` before o_proj."""
    sites = {}
    for site in SITES:
        transform: Callable[[torch.Tensor], torch.Tensor] | None = None
        if site == "down":
            transform = lambda x: rotate_rows(x, groups)  # noqa: E731
        elif site == "o":
            transform = mix
        sites[site] = planned_site(uniform_plan(site_width(adapter, site), bits), (bits,), True, transform)
    return sites


@dataclass(frozen=True)
class QuaRot(Method):
    """Random Hadamard rotations everywhere, uniform bits, weights by GPTQ.

    Rounding as in the ResQ paper's comparison (its section 5): per-token asymmetric activations, per-head asymmetric
    KV. QuaRot's own release rounds activations symmetrically with clip ratio 0.9.
    """

    bits: int = 4
    name: str = "quarot"
    label: str = "QuaRot"
    source: str = "arXiv 2404.00456, section 4"

    def settings(self) -> dict[str, object]:
        return {"bits": self.bits}

    def prepare(self, lab: Lab) -> Prepared:
        return _QuaRotPrepared(lab, self)


class _QuaRotPrepared(RotatedPrepared):
    def __init__(self, lab: Lab, method: QuaRot) -> None:
        super().__init__(lab, hadamard_rotations(lab.adapter, lab.seed))
        self._groups = down_groups(lab.adapter)
        self._mix = head_mixing(lab.adapter)
        self._sites = uniform_rotated_sites(lab.adapter, method.bits, self._groups, self._mix)
        self._bits = method.bits

    def layer(self, index: int) -> LayerPlan:
        rotation = self.rotations.layer(index)
        tensors = fuse_layer(self.source.layer_tensors(index), self.adapter, index, rotation, self._groups)
        if self._mix is not None:
            # x·M ↦ W·Mᵀ, and the mixing matrix acts on rows of W as it acts on x (H ⊗ I on both sides).
            key = self.adapter.linear(index, "o") + ".weight"
            tensors[key] = self._mix(tensors[key])
        kv = uniform_kv(self.adapter.head_dim, self._bits, rotation.key)
        return LayerPlan(tensors, self._sites, kv, self._bits)


@dataclass(frozen=True)
class SpinQuant(Method):
    """QuaRot's layout with U_A (d × d) and one U_B a layer trained by Cayley SGD, without mixing over heads.

    Training rounds activations and KV, not weights; GPTQ follows (SpinQuant, section 4.3). The paper trains on 800
    sequences of 2048 tokens; here ``train_tokens`` is the budget.
    """

    bits: int = 4
    train_tokens: int = 65_536
    lr: float = 1.5
    name: str = "spinquant"
    label: str = "SpinQuant"
    source: str = "arXiv 2405.16406, sections 3 and 4"

    def settings(self) -> dict[str, object]:
        return {"bits": self.bits, "train_tokens": self.train_tokens, "lr": self.lr}

    def prepare(self, lab: Lab) -> Prepared:
        return _SpinQuantPrepared(lab, self)


class _SpinQuantPrepared(RotatedPrepared):
    def __init__(self, lab: Lab, method: SpinQuant) -> None:
        adapter = lab.adapter
        initial = hadamard_rotations(adapter, lab.seed)
        self._groups = down_groups(adapter)
        self._sites = uniform_rotated_sites(adapter, method.bits, self._groups)
        self._bits = method.bits
        blocks = RotationBlocks((adapter.hidden_size,), (adapter.head_dim,), share_value_heads=True)
        kv = [uniform_kv(adapter.head_dim, method.bits, initial.key[index]) for index in range(adapter.num_layers)]
        trained = train_rotations(
            lab.runner,
            lab.calibration,
            initial,
            blocks,
            {site: plan.activation for site, plan in self._sites.items()},
            kv,
            self._groups,
            TrainOptions(method.train_tokens, lr=method.lr, seed=lab.seed),
            lambda done, total, loss: lab.progress(f"{method.name} training (loss {loss:.3f})", done, total),
        )
        super().__init__(lab, trained)

    def layer(self, index: int) -> LayerPlan:
        rotation = self.rotations.layer(index)
        tensors = fuse_layer(self.source.layer_tensors(index), self.adapter, index, rotation, self._groups)
        return LayerPlan(tensors, self._sites, uniform_kv(self.adapter.head_dim, self._bits, rotation.key), self._bits)
