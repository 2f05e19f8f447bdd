"""The bases of a model (P, from calibration) and the rotations made of them (U = P·R, for given high counts)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from offline.bases.eigen import eigenbasis
from offline.bases.rotation import haar_orthogonal, named_generator, subspace_rotation
from offline.calibrate.moments import ModelMoments
from offline.calibrate.storage import load_tensors, save_tensors
from resq_vllm.errors import ResQError

KIND = "resq-basis-1"
FILE_NAME = "resq_basis.safetensors"
Site = Literal["residual", "value", "key"]
# pca is the method; the others are for ablations. identity keeps the model's own axes; random is one Haar rotation of
# the whole space, seeded apart from the rotations inside the subspaces.
BasisKind = Literal["pca", "identity", "random"]
SITES: tuple[Site, ...] = ("residual", "value", "key")


@dataclass(frozen=True)
class LayerRotation:
    """What one layer needs: U_A [d, d], U_B [kv, hd, hd], U_C [hd, hd]; float64."""

    residual: torch.Tensor
    value: torch.Tensor
    key: torch.Tensor


@dataclass(frozen=True)
class Rotations:
    """Final orthogonal matrices, float64.

    ``residual`` U_A [d, d], ``value`` U_B [L, kv, hd, hd], ``key`` U_C [L, hd, hd].

    Columns are ordered low first; the last ``high_hidden`` (``high_head``) columns span the high-precision part.
    """

    residual: torch.Tensor
    value: torch.Tensor
    key: torch.Tensor
    high_hidden: int
    high_head: int

    def layer(self, index: int) -> LayerRotation:
        """The three matrices of one layer."""
        return LayerRotation(self.residual, self.value[index], self.key[index])

    def to(self, device: str | torch.device) -> Rotations:
        """The same on another device, where ``fuse_layer`` will then compute."""
        residual, value, key = (t.to(device) for t in (self.residual, self.value, self.key))
        return Rotations(residual, value, key, self.high_hidden, self.high_head)


@dataclass(frozen=True)
class CapturedVariance:
    """Share (0 to 1) of E‖x‖² in the high-precision part: ``residual`` scalar, ``value`` [L, kv], ``key`` [L]."""

    residual: torch.Tensor
    value: torch.Tensor
    key: torch.Tensor


@dataclass(frozen=True)
class Bases:
    """Orthogonal P with the variance along each column, per site; float64.

    ``residual`` [d, d], ``value`` [L, kv, hd, hd], ``key`` [L, hd, hd]; the variances have one dimension less and, for
    PCA, ascend. P does not depend on the high counts: one saved basis serves every rank. ``down_energy`` [L, f]: mean
    x_j² of down_proj's input channels, which are not rotated but ordered by it.
    """

    residual: torch.Tensor
    value: torch.Tensor
    key: torch.Tensor
    residual_variance: torch.Tensor
    value_variance: torch.Tensor
    key_variance: torch.Tensor
    down_energy: torch.Tensor
    fingerprint: str

    @classmethod
    def from_moments(cls, moments: ModelMoments, kinds: Mapping[Site, BasisKind] | None = None, seed: int = 0) -> Bases:
        """PCA of every site, or the basis that ``kinds`` names for it (``seed`` matters to "random" alone).

        Raises ResQError when the moments are not of all layers.
        """
        if moments.layers_done < len(moments.value):
            raise ResQError(
                f"moments of {moments.layers_done} of {len(moments.value)} layers only; finish the calibration first"
            )
        means: dict[Site, torch.Tensor] = {
            "residual": moments.residual.mean.cpu(),
            "value": torch.stack([m.mean for m in moments.value]).cpu(),
            "key": torch.stack([m.mean for m in moments.key]).cpu(),
        }
        made = {site: _basis(means[site], (kinds or {}).get(site, "pca"), site, seed) for site in SITES}
        vectors = {site: made[site][1] for site in SITES}
        variances = {f"{site}_variance": made[site][0] for site in SITES}
        energy = moments.down.cpu() / moments.value[0].tokens
        return cls(**vectors, **variances, down_energy=energy, fingerprint=moments.fingerprint)

    def compose(
        self,
        high_hidden: int,
        high_head: int,
        seed: int,
        random_rotation: bool = True,
        lowest_hidden: int = 0,
        lowest_head: int = 0,
    ) -> Rotations:
        """U = P·blkdiag(R_low, R_high) with the last ``high_hidden`` (``high_head``) columns as the high part.

        0 and the full dimension are allowed. ``random_rotation=False`` gives U = P (for ablations). The first
        ``lowest_hidden`` (``lowest_head``) columns get a rotation of their own, for a third precision below the low
        one. Raises ResQError for a high count out of range.
        """
        for name, high, dim in (
            ("hidden", high_hidden, self.residual.shape[-1]),
            ("head", high_head, self.key.shape[-1]),
        ):
            if not 0 <= high <= dim:
                raise ResQError(f"{high} high-precision dimensions of a {name} of {dim}; give a count from 0 to {dim}")
        if not random_rotation:
            return Rotations(self.residual, self.value, self.key, high_hidden, high_head)
        layers, kv, hd, _ = self.value.shape
        value = torch.stack(
            [
                torch.stack(
                    [subspace_rotation(hd, high_head, seed, "value", i, t, lowest=lowest_head) for t in range(kv)]
                )
                for i in range(layers)
            ]
        )
        key = torch.stack([subspace_rotation(hd, high_head, seed, "key", i, lowest=lowest_head) for i in range(layers)])
        residual = subspace_rotation(self.residual.shape[-1], high_hidden, seed, "residual", lowest=lowest_hidden)
        return Rotations(self.residual @ residual, self.value @ value, self.key @ key, high_hidden, high_head)

    def captured(self, high_hidden: int, high_head: int) -> CapturedVariance:
        """How much of each site's variance the last columns hold; rotations inside the subspaces do not matter."""
        return CapturedVariance(
            _share(self.residual_variance, high_hidden),
            _share(self.value_variance, high_head),
            _share(self.key_variance, high_head),
        )

    def save(self, path: Path, metadata: Mapping[str, str] | None = None) -> None:
        """Write ``resq_basis.safetensors`` (float64), whole or not at all; ``metadata`` is kept with it."""
        tensors: dict[str, torch.Tensor] = {}
        for site in SITES:
            tensors[site] = getattr(self, site)
            tensors[f"{site}_variance"] = getattr(self, f"{site}_variance")
        tensors["down_energy"] = self.down_energy
        save_tensors(path, tensors, dict(metadata or {}) | {"kind": KIND, "fingerprint": self.fingerprint})

    @classmethod
    def load(cls, path: Path, fingerprint: str | None = None) -> Bases:
        """Read what ``save`` wrote, from a file or from its folder.

        Raises ResQError when it is missing, truncated, lacks a tensor, is not orthogonal, or is not of ``fingerprint``.
        """
        path = path / FILE_NAME if path.is_dir() else path
        tensors, metadata = load_tensors(path, KIND)
        try:
            parts = {name: tensors[name].double() for site in SITES for name in (site, f"{site}_variance")}
            # Releases before the high part of down_proj did not write it.
            parts["down_energy"] = tensors.get("down_energy", torch.zeros(len(parts["key"]), 0, dtype=torch.float64))
            bases = cls(**parts, fingerprint=metadata["fingerprint"])
        except KeyError as error:
            raise ResQError(f"{path}: lacks {error}; delete it and compute the basis again") from error
        if fingerprint is not None and bases.fingerprint != fingerprint:
            raise ResQError(f"{path}: is the basis of another model or other calibration text; compute it again")
        for site in SITES:
            matrix: torch.Tensor = getattr(bases, site)
            error_norm = (matrix.mT @ matrix - torch.eye(matrix.shape[-1], dtype=torch.float64)).abs().max()
            # NaN compares false, hence "not <=".
            if not float(error_norm) <= 1e-5:
                raise ResQError(f"{path}: tensor {site} is not orthogonal; delete the file and compute the basis again")
        return bases


def _basis(mean: torch.Tensor, kind: BasisKind, site: Site, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(variance along each column, columns) of a site."""
    if kind == "pca":
        return eigenbasis(mean, f"second moment of the {site} site")
    dim = mean.shape[-1]
    one = (
        torch.eye(dim, dtype=torch.float64)
        if kind == "identity"
        else haar_orthogonal(dim, named_generator(seed, site, "basis"))
    )
    vectors = one.expand(mean.shape).contiguous()
    return (vectors.mT @ mean @ vectors).diagonal(dim1=-2, dim2=-1).contiguous(), vectors


def _share(variance: torch.Tensor, high: int) -> torch.Tensor:
    total = variance.sum(-1)
    return variance[..., variance.shape[-1] - high :].sum(-1) / torch.where(total > 0, total, 1.0)
