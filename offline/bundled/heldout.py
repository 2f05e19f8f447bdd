"""Held-out perplexity of the bundled model: one protocol for the training log, the tests and the README."""

import math
from typing import Any

import torch
import torch.nn.functional as F

WINDOW = 512  # tokens, the BOS token included


def heldout_windows(tokenizer: Any, text: str, window: int = WINDOW) -> torch.Tensor:
    """`text` tokenized as a whole and cut into [windows, window] int64 rows: BOS and window-1 tokens.

    The windows do not overlap; the tokens behind the last full one are left out.
    """
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)
    body = window - 1
    count = ids.numel() // body
    bos = torch.full((count, 1), tokenizer.bos_token_id, dtype=torch.int64)
    return torch.cat([bos, ids[: count * body].view(count, body)], dim=1)


@torch.no_grad()
def heldout_loss(model: torch.nn.Module, windows: torch.Tensor, batch: int = 8) -> float:
    """Mean negative log-likelihood, in nats, over the windows' predicted tokens (all but each BOS)."""
    total = 0.0
    for chunk in windows.split(batch):
        logits = model(input_ids=chunk, use_cache=False).logits[:, :-1].float()
        total += F.cross_entropy(logits.flatten(0, 1), chunk[:, 1:].flatten(), reduction="sum").item()
    return total / (windows.shape[0] * (windows.shape[1] - 1))


def heldout_perplexity(model: torch.nn.Module, windows: torch.Tensor) -> float:
    """exp of `heldout_loss`."""
    return math.exp(heldout_loss(model, windows))
