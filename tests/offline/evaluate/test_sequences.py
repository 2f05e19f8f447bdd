"""Windows and texts as token ids."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offline.evaluate.dataset import Dataset
from offline.evaluate.sequences import model_sequences, token_sequences
from resq_vllm.errors import ResQError
from tests.offline.models.tiny import save_tiny, tiny_tokenizer

TEN = Dataset("ten", "windows", ("a b c d e f g h i j",))


def encode(text: str) -> list[int]:
    return [ord(word) - ord("a") + 10 for word in text.split()]


def test_windows_start_with_bos_and_drop_the_rest() -> None:
    sequences = token_sequences(TEN, encode, bos=1, context=100, seqlen=4)
    assert sequences.ids == ((1, 10, 11, 12), (1, 13, 14, 15), (1, 16, 17, 18))
    assert sequences.predicted_tokens == 9


def test_windows_of_a_tokenizer_without_bos() -> None:
    assert token_sequences(TEN, encode, None, 100, seqlen=5).ids == ((10, 11, 12, 13, 14), (15, 16, 17, 18, 19))


def test_texts_are_cut_at_the_context_and_one_token_texts_without_bos_dropped() -> None:
    texts = Dataset("texts", "texts", ("a b c d e f", "a", "a b"))
    assert token_sequences(texts, encode, 1, context=4).ids == ((1, 10, 11, 12), (1, 10), (1, 10, 11))
    assert token_sequences(texts, encode, None, context=4).ids == ((10, 11, 12, 13), (10, 11))


def test_default_window_is_2048_or_the_context() -> None:
    long = Dataset("long", "windows", ("a " * 5000,))
    assert token_sequences(long, encode, 1, context=8192).seqlen == 2048
    assert token_sequences(long, encode, 1, context=512).seqlen == 512


def test_limit_keeps_the_first() -> None:
    assert token_sequences(TEN, encode, 1, 100, seqlen=4, limit=2).ids == ((1, 10, 11, 12), (1, 13, 14, 15))


@given(tokens=st.integers(1, 60), seqlen=st.integers(2, 30), bos=st.sampled_from([None, 1]))
def test_windows_cover_the_text_in_order(tokens: int, seqlen: int, bos: int | None) -> None:
    dataset = Dataset("text", "windows", ("x",))
    room = seqlen - (bos is not None)

    def numbers(_: str) -> list[int]:
        return list(range(100, 100 + tokens))

    if tokens < room:
        with pytest.raises(ResQError, match="fewer than one window"):
            token_sequences(dataset, numbers, bos, 64, seqlen)
        return
    ids = token_sequences(dataset, numbers, bos, 64, seqlen).ids
    assert {len(window) for window in ids} == {seqlen}
    inner = [token for window in ids for token in window[seqlen - room :]]
    assert inner == list(range(100, 100 + tokens // room * room))


@pytest.mark.parametrize("seqlen", [0, 1, 101])
def test_window_out_of_range(seqlen: int) -> None:
    with pytest.raises(ResQError, match=f"seqlen is {seqlen}; give a number from 2 to the model's context of 100"):
        token_sequences(TEN, encode, 1, 100, seqlen)


def test_limit_must_be_positive() -> None:
    with pytest.raises(ResQError, match="limit is 0"):
        token_sequences(TEN, encode, 1, 100, 4, limit=0)


def test_texts_without_two_tokens() -> None:
    with pytest.raises(ResQError, match="no text of two tokens"):
        token_sequences(Dataset("texts", "texts", ("a",)), encode, None, 100)


@pytest.mark.parametrize("bos", [True, False])
def test_tokenizer_and_context_of_a_folder(bos: bool, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    tiny_tokenizer(bos).save_pretrained(tmp_path)
    dataset = Dataset("words", "windows", (" ".join(f"w{i % 62}" for i in range(300)),))
    sequences = model_sequences(tmp_path, dataset)
    assert sequences.seqlen == 128
    assert sequences.ids[0][:3] == ((1, 2, 3) if bos else (2, 3, 4))


def test_folder_without_tokenizer(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    with pytest.raises(ResQError, match="tokenizer cannot be loaded"):
        model_sequences(tmp_path, TEN)


def test_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(ResQError, match=r"cannot read config\.json in"):
        model_sequences(tmp_path / "none", TEN)
