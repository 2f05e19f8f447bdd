"""Text that the model writes itself: reproducible, cut at its end, and from the model's own distribution."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from offline.bundled import MODEL_DIR
from offline.calibrate.generated import calibration_sequences, generated_sequences
from offline.evaluate.reference_model import load_plain_model
from offline.models.source import ModelSource
from resq_vllm.errors import ResQError
from tests.offline.models.tiny import save_tiny, tiny_tokenizer


def test_bundled_model_prefers_its_own_text() -> None:
    source = ModelSource.open(str(MODEL_DIR))
    tokenizer = source.tokenizer(False)
    sequences = generated_sequences(source, tokenizer, 4, 48, seed=0)
    again = generated_sequences(source, tokenizer, 4, 48, seed=0)
    assert [s.tolist() for s in sequences] == [s.tolist() for s in again]
    assert [s.tolist() for s in sequences] != [
        s.tolist() for s in generated_sequences(source, tokenizer, 4, 48, seed=1)
    ]
    assert all(s.shape[0] == 1 and 1 < s.shape[1] <= 48 for s in sequences)
    model = load_plain_model(MODEL_DIR)
    shuffled = [torch.cat((s[:, :1], s[:, 1:].flip(1)), 1) for s in sequences]
    with torch.no_grad():
        own, other = (sum(float(model(input_ids=s, labels=s).loss) for s in texts) for texts in (sequences, shuffled))
    assert own < 0.8 * other


def test_texts_stop_before_their_end_token(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    source = ModelSource.open(str(tmp_path))
    tokenizer = source.tokenizer(False)
    tokenizer.eos_token = "w3"
    sequences = generated_sequences(source, tokenizer, 40, 64, seed=0)
    assert any(s.shape[1] < 64 for s in sequences)
    for sequence in sequences:
        assert int(sequence[0, 0]) == tokenizer.bos_token_id
        assert not {tokenizer.eos_token_id, tokenizer.bos_token_id} & set(sequence[0, 1:].tolist())


def test_kept_text_is_read_back_for_the_same_arguments_only(tmp_path: Path) -> None:
    model, keep = tmp_path / "model", tmp_path / "out" / "calibration.json"
    save_tiny("llama", model)
    tiny_tokenizer(bos=False).save_pretrained(model)
    source = ModelSource.open(str(model))
    tokenizer = source.tokenizer(False)
    first = generated_sequences(source, tokenizer, 6, 32, 0, keep)
    keep.write_text(keep.read_text().replace(f'"ids": [[{first[0][0, 0]},', '"ids": [[63,'))
    read = generated_sequences(source, tokenizer, 6, 32, 0, keep)
    assert int(read[0][0, 0]) == 63
    assert len(generated_sequences(source, tokenizer, 7, 32, 0, keep)) == 7


def test_too_little_of_it_is_refused(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    source = ModelSource.open(str(tmp_path))
    with pytest.raises(ResQError, match=r"the model's own text: .* fewer than the hidden size 48"):
        calibration_sequences("self", source, source.tokenizer(False), 2, 8, 0)
