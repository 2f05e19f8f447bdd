"""Perplexity one decoder layer at a time: what ``resq quantize`` puts into the model card, within its memory bound."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn.functional import cross_entropy

from offline.evaluate.perplexity import Perplexity, perplexity
from offline.evaluate.sequences import Sequences
from offline.models.layer import LoadedLayer
from offline.models.runner import LayerRunner, make_batches
from offline.quantize.lm_head import OutputHead

# Logits of this many positions at a time: a 128k vocabulary in float32 is 0.5 MB a position, and their softmax as much.
_LOGIT_ROWS = 256


@torch.no_grad()
def streaming_perplexity(
    runner: LayerRunner,
    sequences: Sequences,
    layer: Callable[[int], LoadedLayer],
    embedding: Callable[[], torch.Tensor],
    head: Callable[[], OutputHead],
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Run ``sequences`` through the layers that ``layer(index)`` gives, plain or fake-quantized.

    ``embedding`` gives the table [vocab, d], ``head`` what follows the layers, each when it is needed and in any float
    type; arithmetic in the runner's dtype. Holds the hidden states beside one layer, or one of those two.
    ``progress`` gets (layers done, layers).
    """
    batches = make_batches([torch.tensor([ids]) for ids in sequences.ids])
    hiddens = runner.embed(batches, embedding())
    layers = runner.adapter.num_layers
    for index in range(layers):
        layer(index).run(hiddens)
        if progress is not None:
            progress(index + 1, layers)
    return perplexity(sequence_nll(runner, batches, hiddens, head()), sequences)


@torch.no_grad()
def sequence_nll(
    runner: LayerRunner,
    batches: Sequence[torch.Tensor],
    hiddens: Sequence[torch.Tensor],
    head: OutputHead,
) -> list[float]:
    """Summed NLL in nats of each sequence: token ids [B, T] and the last layer's outputs [B, T, d], batch by batch."""
    nll: list[float] = []
    for ids, hidden in zip(batches, hiddens, strict=True):
        for row, states in zip(ids, hidden, strict=True):
            losses = []
            for start in range(0, len(row) - 1, _LOGIT_ROWS):
                stop = min(start + _LOGIT_ROWS, len(row) - 1)
                logits = runner.logits(states[None, start:stop], head.norm, head.weight, head.rounding)[0].float()
                losses.append(
                    cross_entropy(logits, row[start + 1 : stop + 1].to(logits.device), reduction="sum").double()
                )
            nll.append(float(torch.stack(losses).sum()))
    return nll
