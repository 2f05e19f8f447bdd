"""Perplexity: negative log-likelihoods of token sequences, and how a protocol averages them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from offline.evaluate.dataset import Protocol, load_dataset
from offline.evaluate.sequences import Sequences, model_sequences
from resq_vllm.errors import ResQError

Engine = Literal["torch", "vllm"]
_BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Perplexity:
    """A result.

    Attributes:
        value: the perplexity.
        dataset: name of the data set.
        protocol: how the likelihoods were averaged.
        sequences: windows or texts.
        tokens: predicted tokens.
        seqlen: longest sequence allowed.

    """

    value: float
    dataset: str
    protocol: Protocol
    sequences: int
    tokens: int
    seqlen: int


def perplexity(nll: Sequence[float], sequences: Sequences) -> Perplexity:
    """Average ``nll``, the summed negative log-likelihood in nats of each sequence's predicted tokens.

    windows: exp(mean over windows of NLL/tokens); texts: exp(ΣNLL/Σtokens). Raises ResQError for a likelihood that is
    not a number.
    """
    for number, value in enumerate(nll):
        if math.isnan(value):
            raise ResQError(
                f"the model gives NaN for sequence {number} of {sequences.name}; check the checkpoint, or evaluate in "
                "float32"
            )
    counts = [len(ids) - 1 for ids in sequences.ids]
    if sequences.protocol == "windows":
        mean = math.fsum(value / count for value, count in zip(nll, counts, strict=True)) / len(counts)
    else:
        mean = math.fsum(nll) / sum(counts)
    # A ruined model can be worse than exp(709), the largest float64 power.
    value = math.exp(mean) if mean < 700 else math.inf
    return Perplexity(value, sequences.name, sequences.protocol, len(counts), sum(counts), sequences.seqlen)


def sequence_nll(model: Any, sequences: Sequences, progress: bool = True) -> list[float]:
    """Summed NLL in nats of each sequence under a transformers causal language model, one float a sequence.

    Sequences are batched with padding on the right, which a causal model cannot see; logits are reduced in float32 and
    summed in float64.
    """
    result: list[float] = []
    bar = tqdm(total=len(sequences.ids), desc=f"perplexity on {sequences.name}", unit="seq", disable=not progress)
    with torch.inference_mode(), bar:
        for batch in _batches(sequences.ids):
            ids = torch.zeros(len(batch), max(len(s) for s in batch), dtype=torch.long)
            for row, sequence in enumerate(batch):
                ids[row, : len(sequence)] = torch.tensor(sequence)
            ids = ids.to(model.device)
            logits = model(input_ids=ids, use_cache=False).logits
            for row, sequence in enumerate(batch):
                scores = logits[row, : len(sequence) - 1].float()
                losses = torch.nn.functional.cross_entropy(scores, ids[row, 1 : len(sequence)], reduction="none")
                result.append(float(losses.double().sum()))
            bar.update(len(batch))
    return result


def _batches(ids: Sequence[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
    """Consecutive sequences while the padded batch stays within the token budget; always at least one."""
    batch: list[tuple[int, ...]] = []
    for sequence in ids:
        longest = max(len(sequence), *(len(s) for s in batch)) if batch else len(sequence)
        if batch and longest * (len(batch) + 1) > _BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(sequence)
    if batch:
        yield batch


def model_perplexity(model: Any, sequences: Sequences, progress: bool = True) -> Perplexity:
    """Perplexity of a loaded transformers model (plain, reference or naive) on ``sequences``."""
    return perplexity(sequence_nll(model, sequences, progress), sequences)


def evaluate_perplexity(
    directory: Path,
    dataset: str = "bundled",
    engine: Engine = "torch",
    seqlen: int | None = None,
    limit: int | None = None,
    dtype: torch.dtype = torch.float32,
    progress: bool = True,
    tensor_parallel: int = 1,
    enforce_eager: bool = True,
    kv_cache_bytes: int | None = None,
    trust_remote_code: bool = False,
) -> Perplexity:
    """Perplexity of the model in ``directory``, plain or ResQ.

    Args:
        directory: model folder with a tokenizer.
        dataset: "bundled", "wikitext2", FILE.txt or FILE.jsonl (:func:`offline.evaluate.dataset.load_dataset`).
        engine: "torch" (the reference model) or "vllm" (the served kernels).
        seqlen: tokens a sequence, BOS included; default by protocol.
        limit: score the first ``limit`` sequences only.
        dtype: torch engine: of everything that is not quantized.
        progress: show a progress bar.
        tensor_parallel: vllm engine: ranks.
        enforce_eager: vllm engine: no compilation.
        kv_cache_bytes: vllm engine: size of the KV cache per rank; None = vLLM's default.
        trust_remote_code: let the tokenizer run code from the folder.

    """
    # Imported here: building models and starting vLLM are heavy, and arithmetic on likelihoods needs neither.
    from offline.evaluate.reference_model import load_reference_model
    from offline.evaluate.vllm_engine import vllm_nll

    sequences = model_sequences(directory, load_dataset(dataset), seqlen, limit, trust_remote_code)
    if engine == "vllm":
        nll = vllm_nll(directory, sequences, tensor_parallel, enforce_eager, kv_cache_bytes, progress)
        return perplexity(nll, sequences)
    return model_perplexity(load_reference_model(directory, dtype), sequences, progress)
