"""Texts of a comparison as token sequences."""

from __future__ import annotations

from pathlib import Path

import pytest

from offline.bundled import MODEL_DIR
from offline.compare.options import CompareOptions
from offline.compare.texts import MAIN, evaluation_sequences
from offline.models.tokenizer import load_tokenizer
from resq_vllm.errors import ResQError


@pytest.fixture(scope="module")
def tokenizer() -> object:
    return load_tokenizer(MODEL_DIR)


def options(tmp_path: Path, **texts: str) -> CompareOptions:
    (tmp_path / "main.txt").write_text("def add(a, b):\n    return a + b\n" * 40)
    files = {}
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_text(text)
        files[name] = str(tmp_path / f"{name}.txt")
    return CompareOptions(model="m", dataset=str(tmp_path / "main.txt"), texts=files, seqlen=64)


def test_short_text_is_one_window_of_its_own_length(tmp_path: Path, tokenizer: object) -> None:
    found = evaluation_sequences(options(tmp_path, short="x = 1\n", long="x = 1\n" * 90), tokenizer, 1024)
    assert list(found) == [MAIN, "short", "long"]
    assert {len(ids) for ids in found[MAIN].ids} == {64}
    assert {len(ids) for ids in found["long"].ids} == {64}
    (only,) = found["short"].ids
    assert 2 < len(only) < 64


def test_window_is_capped_at_the_context(tmp_path: Path, tokenizer: object) -> None:
    assert evaluation_sequences(options(tmp_path), tokenizer, 32)[MAIN].seqlen == 32


def test_missing_and_empty_texts_are_named(tmp_path: Path, tokenizer: object) -> None:
    chosen = options(tmp_path)
    for name, word in (("absent.txt", "no such file"), ("empty.txt", "holds no text")):
        (tmp_path / "empty.txt").write_text("\n")
        bad = chosen.model_copy(update={"texts": {"de": str(tmp_path / name)}})
        with pytest.raises(ResQError, match=rf"{name}.*{word}"):
            evaluation_sequences(bad, tokenizer, 1024)
