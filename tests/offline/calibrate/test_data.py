"""Calibration sequences: what each kind of source gives, and one sentence for each kind of bad source."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from offline.calibrate import data
from offline.calibrate.data import load_sequences, require_tokens
from resq_vllm.errors import ResQError
from tests.offline.models.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
NO_BOS = tiny_tokenizer(bos=False)


def words(count: int) -> str:
    """Text whose token ids are 2, 3, ... 61, 2, 3, ... (so that each place can be told from the ids)."""
    return " ".join(f"w{i % 60}" for i in range(count))


def text_file(folder: Path, count: int) -> str:
    path = folder / "text.txt"
    path.write_text(words(count))
    return str(path)


def starts(sequences: list[torch.Tensor], skip: int = 1) -> list[int]:
    return [int(s[0, skip]) - 2 for s in sequences]


def assert_consecutive(sequence: torch.Tensor) -> None:
    ids = sequence[0, 1:] - 2
    assert torch.equal(ids, (ids[0] + torch.arange(len(ids))) % 60)


def test_windows_start_with_bos_at_random_places(tmp_path: Path) -> None:
    path = text_file(tmp_path, 1000)
    sequences = load_sequences(path, TOKENIZER, 6, 32, seed=0)
    assert len(sequences) == 6
    for sequence in sequences:
        assert sequence.shape == (1, 32)
        assert sequence.dtype == torch.int64
        assert int(sequence[0, 0]) == 1
        assert_consecutive(sequence)
    assert len(set(starts(sequences))) > 1
    assert starts(load_sequences(path, TOKENIZER, 6, 32, seed=0)) == starts(sequences)
    assert starts(load_sequences(path, TOKENIZER, 6, 32, seed=1)) != starts(sequences)


def test_tokenizer_without_bos_gives_text_only(tmp_path: Path) -> None:
    sequences = load_sequences(text_file(tmp_path, 400), NO_BOS, 3, 32, seed=0)
    assert all(s.shape == (1, 32) and int(s.min()) >= 2 for s in sequences)


def test_short_text_gives_fewer_windows_evenly_spread(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sequences = load_sequences(text_file(tmp_path, 55), TOKENIZER, 8, 17, seed=0)
    assert starts(sequences) == [0, 20, 39]
    assert all(s.shape == (1, 17) for s in sequences)
    assert "3 calibration sequences, not 8" in caplog.text


def test_text_of_exactly_the_windows_asked_for(tmp_path: Path) -> None:
    assert len(load_sequences(text_file(tmp_path, 48), TOKENIZER, 3, 17, seed=0)) == 3


def test_text_shorter_than_one_window_is_one_sequence(tmp_path: Path) -> None:
    sequences = load_sequences(text_file(tmp_path, 10), TOKENIZER, 4, 32, seed=0)
    assert [s.shape for s in sequences] == [(1, 11)]


def test_jsonl_texts_stay_apart_in_order(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    texts = ["w3 w4", "", "w5 w6 w7 w8 w9", "w10", "w11"]
    path.write_text("\n".join(json.dumps({"text": t, "id": 1}) for t in texts) + "\n\n")
    sequences = load_sequences(str(path), TOKENIZER, 3, 4, seed=0)
    assert [s.tolist() for s in sequences] == [[[1, 5, 6]], [[1, 7, 8, 9]], [[1, 12]]]


def test_jsonl_keeps_unicode_line_separators_inside_a_text(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "w1\u2028w2"}\n', encoding="utf-8")
    assert load_sequences(str(path), TOKENIZER, 3, 9, seed=0)[0].tolist() == [[1, 3, 4]]


@pytest.mark.parametrize("line", ["{", "[1]", '{"txt": "w1"}', '{"text": 3}', "null"])
def test_malformed_jsonl_line_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "w1"}\n' + line + "\n")
    with pytest.raises(ResQError, match=r"texts\.jsonl:2: .*\{\"text\": \.\.\.\} a line") as caught:
        load_sequences(str(path), TOKENIZER, 1, 8, seed=0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["empty.txt", "empty.jsonl"])
@pytest.mark.parametrize("content", ["", " \n\n"])
def test_empty_set(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ResQError, match=f"{name}: holds no text"):
        load_sequences(str(tmp_path / name), TOKENIZER, 1, 8, seed=0)


def test_jsonl_of_empty_texts(tmp_path: Path) -> None:
    (tmp_path / "e.jsonl").write_text('{"text": ""}\n{"text": "  "}\n')
    with pytest.raises(ResQError, match="holds no text"):
        load_sequences(str(tmp_path / "e.jsonl"), TOKENIZER, 1, 8, seed=0)


def test_fewer_tokens_than_needed_names_both_counts(tmp_path: Path) -> None:
    path = text_file(tmp_path, 10)
    with pytest.raises(ResQError, match=r"text\.txt: 11 calibration tokens are fewer than the hidden size 12"):
        load_sequences(path, TOKENIZER, 4, 32, seed=0, min_tokens=12)
    assert load_sequences(path, TOKENIZER, 4, 32, seed=0, min_tokens=11)
    with pytest.raises(ResQError, match="0 calibration tokens"):
        require_tokens([], 1, "x")


@pytest.mark.parametrize("name", ["gone.txt", "gone.jsonl"])
def test_missing_file(name: str) -> None:
    with pytest.raises(ResQError, match=f"{name}: no such file"):
        load_sequences(name, TOKENIZER, 1, 8, seed=0)


def test_file_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("caf\xe9 w1".encode("latin-1"))
    with pytest.raises(ResQError, match=r"latin\.txt: not UTF-8 .* at byte 3"):
        load_sequences(str(tmp_path / "latin.txt"), TOKENIZER, 1, 8, seed=0)


def test_file_of_an_unknown_kind(tmp_path: Path) -> None:
    (tmp_path / "text.csv").write_text("w1")
    with pytest.raises(ResQError, match="unknown kind of calibration file"):
        load_sequences(str(tmp_path / "text.csv"), TOKENIZER, 1, 8, seed=0)


@pytest.mark.parametrize(("nsamples", "seqlen"), [(0, 8), (-1, 8), (1, 1)])
def test_senseless_counts(nsamples: int, seqlen: int, tmp_path: Path) -> None:
    with pytest.raises(ResQError, match=r"nsamples is|seqlen is"):
        load_sequences(text_file(tmp_path, 50), TOKENIZER, nsamples, seqlen, seed=0)


def test_bundled_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert Path("offline/bundled/calibration.txt") == Path(*data.BUNDLED.parts[-3:])
    monkeypatch.setattr(data, "BUNDLED", Path(text_file(tmp_path, 100)))
    assert len(load_sequences("bundled", TOKENIZER, 4, 16, seed=0)) == 4


def fake_hub(monkeypatch: pytest.MonkeyPatch, rows: Any) -> list[tuple[Any, ...]]:
    calls: list[tuple[Any, ...]] = []

    def load_dataset(*args: Any, **kwargs: Any) -> Any:
        calls.append((*args, kwargs["split"]))
        if isinstance(rows, Exception):
            raise rows
        return rows

    module = ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


class Rows(SimpleNamespace):
    def __getitem__(self, name: str) -> list[str]:
        return list(self.columns[name])


def test_wikitext2_is_the_raw_train_split_joined_by_blank_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["w1 w2", "", "w3"]
    calls = fake_hub(monkeypatch, Rows(column_names=["text"], columns={"text": texts}))
    assert load_sequences("wikitext2", TOKENIZER, 1, 16, seed=0)[0].tolist() == [[1, 3, 4, 5]]
    assert calls == [("Salesforce/wikitext", "wikitext-2-raw-v1", "train")]


def test_hub_dataset_with_and_without_a_config(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_hub(monkeypatch, Rows(column_names=["text"], columns={"text": ["w1"]}))
    load_sequences("owner/name", TOKENIZER, 1, 16, seed=0)
    load_sequences("owner/name:part", TOKENIZER, 1, 16, seed=0)
    assert calls == [("owner/name", None, "train"), ("owner/name", "part", "train")]


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub(monkeypatch, ConnectionError("no route\nto host"))
    with pytest.raises(ResQError, match=r"owner/name: .*ConnectionError: no route to host.*network"):
        load_sequences("owner/name", TOKENIZER, 1, 16, seed=0)


def test_hub_dataset_without_text(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub(monkeypatch, Rows(column_names=["prompt"], columns={}))
    with pytest.raises(ResQError, match='owner/name: has no column "text"'):
        load_sequences("owner/name", TOKENIZER, 1, 16, seed=0)


def test_package_datasets_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ResQError, match="pip install datasets"):
        load_sequences("owner/name", TOKENIZER, 1, 16, seed=0)
