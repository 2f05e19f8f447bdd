"""The texts of a comparison as token sequences: the data set of the table, and a perplexity for each further text."""

from __future__ import annotations

from typing import Any

from offline.compare.options import CompareOptions
from offline.evaluate.dataset import load_dataset
from offline.evaluate.sequences import Sequences, tokenizer_sequences
from resq_vllm.errors import ResQError

MAIN = ""


def evaluation_sequences(options: CompareOptions, tokenizer: Any, context: int) -> dict[str, Sequences]:
    """What is scored, by name of the text; the comparison's own data set is under ``MAIN``.

    The data set follows ``resq eval``. A further text shorter than one window is one window of its own length, so that
    short texts in other languages can be measured. Raises ResQError for what cannot be read, or has too few tokens.
    """
    seqlen = min(options.seqlen, context)
    found = {MAIN: tokenizer_sequences(tokenizer, load_dataset(options.dataset), context, seqlen, options.windows)}
    for name, file in options.texts.items():
        dataset = load_dataset(file)
        length = seqlen
        if dataset.protocol == "windows":
            prefix = int(tokenizer.bos_token_id is not None)
            tokens = sum(len(tokenizer(t, add_special_tokens=False, verbose=False)["input_ids"]) for t in dataset.texts)
            length = min(length, tokens + prefix)
            if length < 2:
                raise ResQError(f"--text {name}={file}: has {tokens} tokens; give a longer text")
        found[name] = tokenizer_sequences(tokenizer, dataset, context, length, options.windows)
    return found
