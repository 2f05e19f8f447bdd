"""Calibration text as token sequences: the bundled text, a text file, a JSON-lines file or a dataset of the hub."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from offline.texts import hub_text, read_json_lines, read_text
from resq_vllm.errors import ResQError

logger = logging.getLogger(__name__)

BUNDLED = Path(__file__).parents[1] / "bundled" / "calibration.txt"


def load_sequences(
    dataset: str,
    tokenizer: PreTrainedTokenizerBase,
    nsamples: int,
    seqlen: int,
    seed: int,
    min_tokens: int = 0,
) -> list[torch.Tensor]:
    """Token sequences, LongTensor [1, T] with T <= ``seqlen``.

    ``dataset``: "bundled"; a ``.txt`` file; a ``.jsonl`` file; else a hub dataset ``owner/name[:config]`` (train split,
    column "text", joined by blank lines) or its alias "wikitext2".

    Running text gives ``nsamples`` windows at random places (``seed``); when it holds fewer than that many windows side
    by side, then as many as fit, evenly spread without overlap; a text shorter than one window is one sequence. A
    ``.jsonl`` file has one {"text": ...} a line: the first ``nsamples`` texts in order, each by itself, cut at
    ``seqlen``, neither joined nor padded; texts without a token are passed over. Every sequence starts with BOS when
    the tokenizer has one (counted in ``seqlen``).

    Raises ResQError for a missing, empty or malformed file, a dataset that cannot be had, or fewer than ``min_tokens``
    tokens in all (the hidden size: fewer give a singular second moment).
    """
    if nsamples < 1:
        raise ResQError(f"nsamples is {nsamples}; ask for at least one calibration sequence")
    if seqlen < 2:
        raise ResQError(f"seqlen is {seqlen}; calibration sequences need at least 2 tokens")
    bos = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
    if dataset.endswith(".jsonl"):
        sequences = _separate(_first_texts(Path(dataset), nsamples), tokenizer, bos, seqlen)
    else:
        text = _running_text(dataset)
        sequences = _windows(_encode(tokenizer, text), bos, nsamples, seqlen, seed) if text.strip() else []
    if not sequences:
        raise ResQError(f"{dataset}: holds no text; give a calibration set with text in it")
    require_tokens(sequences, min_tokens, dataset)
    return sequences


def require_tokens(sequences: Sequence[torch.Tensor], needed: int, source: str) -> None:
    """Raises ResQError, naming both counts, when the sequences hold fewer than ``needed`` tokens."""
    tokens = sum(sequence.numel() for sequence in sequences)
    if tokens < needed:
        raise ResQError(
            f"{source}: {tokens} calibration tokens are fewer than the hidden size {needed}, too few for a basis; "
            "give more text, more samples or longer sequences"
        )


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # verbose=False: a whole corpus is longer than the model's context by intent.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _sequence(ids: list[int]) -> torch.Tensor:
    return torch.tensor([ids], dtype=torch.long)


def _windows(ids: list[int], bos: list[int], nsamples: int, seqlen: int, seed: int) -> list[torch.Tensor]:
    body = seqlen - len(bos)
    if not ids:
        return []
    fit = len(ids) // body
    if fit >= nsamples:
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(len(ids) - body + 1, (nsamples,), generator=generator).tolist()
    elif fit <= 1:
        starts = [0]
    else:
        starts = [round(i * (len(ids) - body) / (fit - 1)) for i in range(fit)]
    if len(starts) < nsamples:
        logger.warning("the text has %d tokens: %d calibration sequences, not %d", len(ids), len(starts), nsamples)
    return [_sequence(bos + ids[start : start + body]) for start in starts]


def _separate(texts: list[str], tokenizer: PreTrainedTokenizerBase, bos: list[int], seqlen: int) -> list[torch.Tensor]:
    encoded = (_encode(tokenizer, text) for text in texts)
    return [_sequence((bos + ids)[:seqlen]) for ids in encoded if ids]


def _first_texts(path: Path, nsamples: int) -> list[str]:
    return [text for text in read_json_lines(path) if text.strip()][:nsamples]


def _running_text(dataset: str) -> str:
    if dataset == "bundled":
        return read_text(BUNDLED)
    if dataset.endswith(".txt"):
        return read_text(Path(dataset))
    if Path(dataset).exists():
        raise ResQError(f"{dataset}: unknown kind of calibration file; give a .txt or .jsonl file")
    return hub_text(dataset, "train")
