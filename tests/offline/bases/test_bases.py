"""Bases of a model: PCA puts the variance last, composition stays orthogonal, files are checked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from offline.bases.bases import FILE_NAME, SITES, Bases
from offline.calibrate.moments import ModelMoments, SecondMoments
from offline.calibrate.storage import save_tensors
from resq_vllm.errors import ResQError

D, HD, KV, LAYERS, FFN = 32, 8, 2, 3, 64


def random_moments(seed: int = 0) -> ModelMoments:
    generator = torch.Generator().manual_seed(seed)

    def rows(*shape: int) -> torch.Tensor:
        mix = torch.randn(shape[-1], shape[-1], generator=generator) * torch.linspace(0.1, 3, shape[-1])
        return torch.randn(*shape, generator=generator) @ mix

    moments = ModelMoments(
        residual=SecondMoments(D),
        value=[SecondMoments(HD, KV) for _ in range(LAYERS)],
        key=[SecondMoments(HD) for _ in range(LAYERS)],
        down=torch.rand(LAYERS, FFN, generator=generator, dtype=torch.float64),
        layers_done=LAYERS,
        fingerprint="abc",
    )
    moments.residual.update(rows(200, D))
    for layer in range(LAYERS):
        moments.value[layer].update(rows(KV, 100, HD))
        moments.key[layer].update(rows(100, HD))
    return moments


def assert_orthogonal(matrix: torch.Tensor) -> None:
    eye = torch.eye(matrix.shape[-1], dtype=torch.float64)
    assert matrix.dtype == torch.float64
    assert (matrix.mT @ matrix - eye).abs().max() < 1e-12


@pytest.mark.parametrize(("high_hidden", "high_head"), [(4, 2), (0, 0), (D, HD), (1, 3)])
def test_composition_is_orthogonal_and_keeps_the_subspaces(high_hidden: int, high_head: int) -> None:
    moments = random_moments()
    bases = Bases.from_moments(moments)
    rotations = bases.compose(high_hidden, high_head, seed=5)
    captured = bases.captured(high_hidden, high_head)
    means = {
        "residual": moments.residual.mean,
        "value": torch.stack([m.mean for m in moments.value]),
        "key": torch.stack([m.mean for m in moments.key]),
    }
    for site in SITES:
        u, mean = getattr(rotations, site), means[site]
        assert_orthogonal(u)
        energy = (u.mT @ mean @ u).diagonal(dim1=-2, dim2=-1)
        high = high_hidden if site == "residual" else high_head
        share = energy[..., energy.shape[-1] - high :].sum(-1) / energy.sum(-1)
        torch.testing.assert_close(share, getattr(captured, site))
    layer = rotations.layer(1)
    assert torch.equal(layer.value, rotations.value[1])
    assert torch.equal(layer.key, rotations.key[1])


def test_pca_captures_most_in_the_last_columns() -> None:
    moments = random_moments()
    pca = Bases.from_moments(moments)
    for site in SITES:
        assert bool((getattr(pca, f"{site}_variance").diff(dim=-1) >= 0).all())
    for kind in ("identity", "random"):
        other = Bases.from_moments(moments, dict.fromkeys(SITES, kind), seed=1)
        for high in range(1, HD):
            best, worse = pca.captured(4 * high, high), other.captured(4 * high, high)
            for site in SITES:
                assert bool((getattr(best, site) > getattr(worse, site)).all())


def test_kinds_are_chosen_by_site() -> None:
    moments = random_moments()
    bases = Bases.from_moments(moments, {"value": "identity", "key": "random"}, seed=1)
    assert torch.equal(bases.residual, Bases.from_moments(moments).residual)
    assert torch.equal(bases.value, torch.eye(HD, dtype=torch.float64).expand(LAYERS, KV, HD, HD))
    torch.testing.assert_close(bases.value_variance[1, 0], moments.value[1].mean[0].diagonal())
    assert_orthogonal(bases.key)
    assert int((bases.key.abs() > 1e-9).sum()) == LAYERS * HD * HD


def test_without_random_rotation_the_basis_itself() -> None:
    bases = Bases.from_moments(random_moments())
    rotations = bases.compose(4, 2, seed=0, random_rotation=False)
    for site in SITES:
        assert torch.equal(getattr(rotations, site), getattr(bases, site))


def test_seed_decides_and_every_head_has_its_own_rotation() -> None:
    bases = Bases.from_moments(random_moments(), dict.fromkeys(SITES, "identity"))
    first, same, other = (bases.compose(4, 2, seed) for seed in (0, 0, 1))
    for site in SITES:
        assert torch.equal(getattr(first, site), getattr(same, site))
        assert not torch.allclose(getattr(first, site), getattr(other, site))
    assert not torch.allclose(first.value[0, 0], first.value[0, 1])
    assert not torch.allclose(first.value[0, 0], first.value[1, 0])
    assert not torch.allclose(first.key[0], first.key[1])


@pytest.mark.parametrize(("high_hidden", "high_head"), [(-1, 0), (D + 1, 0), (0, HD + 1)])
def test_high_count_out_of_range(high_hidden: int, high_head: int) -> None:
    with pytest.raises(ResQError, match="give a count from 0 to"):
        Bases.from_moments(random_moments()).compose(high_hidden, high_head, seed=0)


def test_unfinished_moments() -> None:
    moments = random_moments()
    moments.layers_done = 2
    with pytest.raises(ResQError, match="2 of 3 layers"):
        Bases.from_moments(moments)


def test_save_and_load(tmp_path: Path) -> None:
    bases = Bases.from_moments(random_moments())
    bases.save(tmp_path / FILE_NAME, {"dataset": "bundled"})
    for path in (tmp_path, tmp_path / FILE_NAME):
        loaded = Bases.load(path, "abc")
        for name in (*SITES, *(f"{site}_variance" for site in SITES)):
            assert torch.equal(getattr(loaded, name), getattr(bases, name))
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


def test_basis_of_another_model(tmp_path: Path) -> None:
    Bases.from_moments(random_moments()).save(tmp_path / FILE_NAME)
    with pytest.raises(ResQError, match="of another model or other calibration text"):
        Bases.load(tmp_path, "def")


def test_missing_basis(tmp_path: Path) -> None:
    with pytest.raises(ResQError, match="no such file"):
        Bases.load(tmp_path)


def test_truncated_basis(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    Bases.from_moments(random_moments()).save(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ResQError, match="truncated"):
        Bases.load(path)


def test_file_of_another_kind(tmp_path: Path) -> None:
    random_moments().save(tmp_path / "moments.safetensors")
    with pytest.raises(ResQError, match="holds resq-moments-2 data, not resq-basis-1"):
        Bases.load(tmp_path / "moments.safetensors")


@pytest.mark.parametrize("damage", ["lacks", "not orthogonal", "nan"])
def test_damaged_basis(damage: str, tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    Bases.from_moments(random_moments()).save(path)
    tensors = load_file(path)
    if damage == "lacks":
        del tensors["key"]
    else:
        tensors["key"][1, 0, 0] = 9.0 if damage == "not orthogonal" else float("nan")
    save_tensors(path, tensors, {"kind": "resq-basis-1", "fingerprint": "abc"})
    with pytest.raises(ResQError, match="lacks 'key'" if damage == "lacks" else "key is not orthogonal"):
        Bases.load(path)
