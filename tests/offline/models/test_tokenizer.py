"""The tokenizer of a folder, also one that brings code of its own, in every command that needs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from offline.cli import app
from offline.models.source import ModelSource
from offline.models.tokenizer import load_tokenizer
from resq_vllm.errors import ResQError
from tests.offline.models.tiny import save_tiny, tiny_tokenizer

REFUSED = "the tokenizer cannot be loaded .* copy the model's tokenizer files there"


@pytest.fixture
def own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model whose tokenizer's code leaves a file ``ran`` beside it."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "model"
    save_tiny("llama", folder)
    (folder / "own.py").write_text(
        "from pathlib import Path\n"
        f"Path({str(folder / 'ran')!r}).touch()\n"
        "from transformers import PreTrainedTokenizerFast\n\n\n"
        "class OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    tiny_tokenizer().save_pretrained(folder)
    own = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    return folder


def commands(folder: Path) -> list[list[str]]:
    text = folder.parent / "text.txt"
    text.write_text(" ".join(["a b c d e f g h"] * 64))
    short = ["--dataset", str(text), "--seqlen", "16", "--windows", "2"]
    calibrated = ["--methods", "bf16", "--calibration", str(text), "--nsamples", "8"]
    return [
        ["eval", str(folder), *short],
        ["eval", str(folder), *short, "--naive-rtn"],
        ["compare", str(folder), *short, *calibrated, "-o", str(folder.parent / "compared")],
    ]


@pytest.mark.parametrize("number", range(3), ids=["eval", "naive", "compare"])
def test_code_of_its_own_runs_only_when_trusted(own_code: Path, number: int) -> None:
    command = commands(own_code)[number]
    with pytest.raises(ResQError, match=f"{REFUSED}.*--trust-remote-code") as caught:
        app(command, standalone_mode=False)
    assert "\n" not in str(caught.value)
    assert not (own_code / "ran").exists()
    app([*command, "--trust-remote-code"], standalone_mode=False)
    assert (own_code / "ran").exists()


def test_a_source_asks_for_trust_as_well(own_code: Path) -> None:
    with pytest.raises(ResQError, match=REFUSED):
        ModelSource.open(own_code).tokenizer()
    ModelSource.open(own_code).tokenizer(trust_remote_code=True)
    assert (own_code / "ran").exists()


def test_folder_without_tokenizer(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    with pytest.raises(ResQError, match=REFUSED):
        load_tokenizer(tmp_path)
