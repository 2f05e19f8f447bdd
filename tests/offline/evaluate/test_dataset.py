"""Evaluation texts: every source and every way in which a file can be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from offline.evaluate import dataset as dataset_module
from offline.evaluate.dataset import BUNDLED_TEXT, load_dataset
from resq_vllm.errors import ResQError


def test_bundled_text() -> None:
    dataset = load_dataset("bundled")
    assert (dataset.protocol, dataset.texts) == ("windows", (BUNDLED_TEXT.read_text(encoding="utf-8"),))


def test_text_file_is_one_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n", encoding="utf-8")
    dataset = load_dataset(str(tmp_path / "a.txt"))
    assert (dataset.name, dataset.protocol, dataset.texts) == ("a.txt", "windows", ("one\n\ntwo\n",))


def test_json_lines_are_texts(tmp_path: Path) -> None:
    lines = [json.dumps({"text": text, "id": 1}) for text in ("one", "zwei\nü")]
    (tmp_path / "a.jsonl").write_text("\n\n".join(lines), encoding="utf-8")
    dataset = load_dataset(str(tmp_path / "a.jsonl"))
    assert (dataset.protocol, dataset.texts) == ("texts", ("one", "zwei\nü"))


def test_wikitext2_is_the_test_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_module, "hub_text", lambda name, split: f"{name} {split}")
    dataset = load_dataset("wikitext2")
    assert (dataset.protocol, dataset.texts) == ("windows", ("wikitext2 test",))


def test_unknown_name() -> None:
    with pytest.raises(ResQError, match="data set 'c4' is unknown; give bundled, wikitext2"):
        load_dataset("c4")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ResQError, match=r"none\.txt: no such file"):
        load_dataset(str(tmp_path / "none.txt"))


@pytest.mark.parametrize(("name", "content"), [("a.txt", " \n"), ("a.jsonl", '{"text": " "}\n'), ("b.jsonl", "\n")])
def test_empty_data_set(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ResQError, match=rf"{name}: holds no text"):
        load_dataset(str(tmp_path / name))
