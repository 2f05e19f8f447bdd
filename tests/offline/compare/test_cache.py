"""Saved rows: found again by everything that decides them, and by nothing less."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from offline.compare import cache
from offline.compare.cache import RowCache, fingerprint, model_digest, write_whole
from resq_vllm.errors import ResQError
from tests.offline.compare.fakes import row

KEY = "a" * 64


@pytest.fixture
def ingredients(tmp_path: Path) -> dict[str, Any]:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(100))
    return {
        "model": folder,
        "calibration": [torch.tensor([[1, 2, 3]]), torch.tensor([[4, 5]])],
        "evaluation": {"": [(1, 2), (3, 4)], "de": [(7, 8)]},
        "settings": {"method": "resq", "high_fraction": 0.125, "seed": 0},
    }


def test_equal_ingredients_give_equal_fingerprints(ingredients: dict[str, Any]) -> None:
    again = ingredients | {"evaluation": {"de": [[7, 8]], "": [[1, 2], [3, 4]]}}
    assert fingerprint(**ingredients) == fingerprint(**again)


@pytest.mark.parametrize(
    "change",
    [
        {"calibration": [torch.tensor([[1, 2, 3]]), torch.tensor([[4, 6]])]},
        {"calibration": [torch.tensor([[1, 2]]), torch.tensor([[3, 4, 5]])]},
        {"calibration": [torch.tensor([[4, 5]]), torch.tensor([[1, 2, 3]])]},
        {"evaluation": {"": [(1, 2), (3, 4)]}},
        {"evaluation": {"": [(1, 2, 3, 4)], "de": [(7, 8)]}},
        {"evaluation": {"": [(1, 2), (3, 4)], "fr": [(7, 8)]}},
        {"settings": {"method": "quarot", "high_fraction": 0.125, "seed": 0}},
        {"settings": {"method": "resq", "high_fraction": 0.25, "seed": 0}},
        {"settings": {"method": "resq", "high_fraction": 0.125}},
    ],
)
def test_any_other_ingredient_is_a_miss(ingredients: dict[str, Any], change: dict[str, Any]) -> None:
    assert fingerprint(**ingredients) != fingerprint(**(ingredients | change))


def test_another_byte_in_the_weights_is_a_miss(ingredients: dict[str, Any]) -> None:
    before = fingerprint(**ingredients)
    weights = ingredients["model"] / "model.safetensors"
    weights.write_bytes(bytes(99) + b"\1")
    os.utime(weights, ns=(1, 1))
    assert fingerprint(**ingredients) != before


def test_another_file_of_the_same_bytes_is_a_miss(ingredients: dict[str, Any]) -> None:
    before = model_digest(ingredients["model"])
    (ingredients["model"] / "config.json").rename(ingredients["model"] / "other.json")
    assert model_digest(ingredients["model"]) != before


def test_another_version_of_the_tool_is_a_miss(ingredients: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint(**ingredients)
    monkeypatch.setattr(cache, "__version__", "99.0")
    cache.tool_digest.cache_clear()
    changed = fingerprint(**ingredients)
    cache.tool_digest.cache_clear()
    assert changed != before


def test_measuring_code_decides_and_showing_code_does_not(
    ingredients: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "tree"
    for name in ("offline/quantize/rtn.py", "offline/compare/plots.py", "resq_vllm/reference.py"):
        (root / name).parent.mkdir(parents=True)
        (root / name).write_text("1")
    monkeypatch.setattr(cache, "_ROOT", root)

    def digest() -> str:
        cache.tool_digest.cache_clear()
        return fingerprint(**ingredients)

    before = digest()
    (root / "offline/compare/plots.py").write_text("2")
    assert digest() == before
    (root / "offline/quantize/rtn.py").write_text("2")
    assert digest() != before
    cache.tool_digest.cache_clear()


def test_a_saved_row_comes_back_whole(tmp_path: Path) -> None:
    saved = row("resq", settings={"seed": 3}, tasks={"code": 0.5}, tokens=7, ppl=float("inf"))
    RowCache(tmp_path).put(KEY, saved)
    assert RowCache(tmp_path).get("resq", KEY) == saved


def test_another_fingerprint_or_method_is_a_miss(tmp_path: Path) -> None:
    rows = RowCache(tmp_path)
    rows.put(KEY, row("resq"))
    assert rows.get("resq", "b" * 64) is None
    assert rows.get("rtn", KEY) is None
    # The same 16 digits, which name the file, are not enough.
    assert rows.get("resq", KEY[:16] + "b" * 48) is None


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"fingerprint": "KEY"}', '{"fingerprint": "KEY", "row": {}}'])
def test_a_damaged_file_is_measured_again_and_said_so(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    rows = RowCache(tmp_path)
    rows.put(KEY, row("resq"))
    (file,) = tmp_path.iterdir()
    file.write_text(damage.replace("KEY", KEY))
    with caplog.at_level(logging.WARNING, logger="resq"):
        assert rows.get("resq", KEY) is None
    assert file.name in caplog.text


def test_a_file_renamed_for_another_method_is_a_miss(tmp_path: Path) -> None:
    rows = RowCache(tmp_path)
    rows.put(KEY, row("resq"))
    (file,) = tmp_path.iterdir()
    file.rename(tmp_path / file.name.replace("resq", "rtn"))
    assert rows.get("rtn", KEY) is None


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.json"
    write_whole(path, "old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ResQError, match=r"file\.json .*No space left"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResQError, match="choose a writable output folder"):
        RowCache(tmp_path / "file" / "rows").put(KEY, row("resq"))


def test_saved_files_are_plain_json(tmp_path: Path) -> None:
    RowCache(tmp_path).put(KEY, row("rtn"))
    (file,) = tmp_path.iterdir()
    assert json.loads(file.read_text())["row"]["method"] == "rtn"
