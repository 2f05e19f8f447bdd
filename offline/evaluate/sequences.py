"""Token sequences of an evaluation: the same for every engine, so that their perplexities can be compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from offline.evaluate.dataset import Dataset, Protocol
from offline.models.tokenizer import load_tokenizer
from offline.transformers_errors import TRANSFORMERS_ERRORS, reason
from resq_vllm.errors import ResQError

DEFAULT_SEQLEN = 2048


@dataclass(frozen=True)
class Sequences:
    """What is scored: every token of a sequence but the first, given those before it.

    Attributes:
        name: of the data set.
        protocol: "windows" (perplexity = exp of the mean over windows of a window's mean NLL) or "texts" (exp of the
            mean NLL over all tokens).
        ids: token ids, one list a sequence.
        seqlen: the longest a sequence may be.

    """

    name: str
    protocol: Protocol
    ids: tuple[tuple[int, ...], ...]
    seqlen: int

    @property
    def predicted_tokens(self) -> int:
        return sum(len(ids) - 1 for ids in self.ids)


def context_length(directory: Path) -> int:
    """``max_position_embeddings`` of config.json; 2048 where the config has none."""
    try:
        config = AutoConfig.from_pretrained(directory)
    except TRANSFORMERS_ERRORS as error:
        raise ResQError(f"cannot read config.json in {directory} ({reason(error)}); give a model folder") from error
    return int(getattr(config, "max_position_embeddings", None) or DEFAULT_SEQLEN)


def token_sequences(
    dataset: Dataset,
    encode: Callable[[str], list[int]],
    bos: int | None,
    context: int,
    seqlen: int | None = None,
    limit: int | None = None,
) -> Sequences:
    """Tokenize ``dataset``.

    windows: the whole text is encoded at once and cut into non-overlapping pieces of seqlen − 1 tokens, each with the
    BOS token before it (without a BOS token: pieces of seqlen); the shorter rest is dropped. texts: [BOS] + the first
    seqlen − 1 tokens of every text.

    Args:
        dataset: texts and protocol.
        encode: text to token ids, without special tokens.
        bos: the BOS token, or None where the tokenizer has none.
        context: the model's context length.
        seqlen: tokens in a window; default min(2048, context) for windows and context for texts.
        limit: keep the first ``limit`` sequences only.

    Raises ResQError when seqlen is out of range, when the text is shorter than a window, or when nothing is left.

    """
    default = min(DEFAULT_SEQLEN, context) if dataset.protocol == "windows" else context
    length = default if seqlen is None else seqlen
    if not 2 <= length <= context:
        raise ResQError(f"seqlen is {length}; give a number from 2 to the model's context of {context} tokens")
    if limit is not None and limit < 1:
        raise ResQError(f"limit is {limit}; give a positive number of sequences")
    prefix = () if bos is None else (bos,)
    room = length - len(prefix)
    ids: list[tuple[int, ...]]
    if dataset.protocol == "windows":
        tokens = [token for text in dataset.texts for token in encode(text)]
        ids = [prefix + tuple(tokens[i : i + room]) for i in range(0, len(tokens) - room + 1, room)]
        if not ids:
            raise ResQError(
                f"{dataset.name} has {len(tokens)} tokens, fewer than one window of {length}; give a longer text or a "
                "smaller seqlen"
            )
    else:
        ids = [prefix + tuple(encode(text)[:room]) for text in dataset.texts]
        ids = [sequence for sequence in ids if len(sequence) > 1]
        if not ids:
            raise ResQError(f"{dataset.name} has no text of two tokens; give longer texts")
    return Sequences(dataset.name, dataset.protocol, tuple(ids[:limit]), length)


def model_sequences(
    directory: Path,
    dataset: Dataset,
    seqlen: int | None = None,
    limit: int | None = None,
    trust_remote_code: bool = False,
) -> Sequences:
    """:func:`token_sequences` with the tokenizer and context length of the model in ``directory``."""
    context = context_length(directory)
    return tokenizer_sequences(load_tokenizer(directory, trust_remote_code), dataset, context, seqlen, limit)


def tokenizer_sequences(
    tokenizer: Any, dataset: Dataset, context: int, seqlen: int | None = None, limit: int | None = None
) -> Sequences:
    """:func:`token_sequences` with a loaded tokenizer and a context length."""

    def encode(text: str) -> list[int]:
        # verbose=False: no warning about a text longer than the context, since it is cut afterwards.
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    return token_sequences(dataset, encode, tokenizer.bos_token_id, context, seqlen, limit)
