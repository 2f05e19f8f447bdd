"""Runs a model layer by layer, so that only one layer's weights and the hidden states are in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from offline.models.adapter import ModelAdapter
from offline.models.attention import ATTENTION_NAME
from offline.models.layer import LoadedLayer, Transform
from offline.models.source import ModelSource
from resq_vllm.errors import ResQError

_HEAD_ROWS = 16384


def make_batches(sequences: Sequence[torch.Tensor], max_tokens: int = 4096) -> list[torch.Tensor]:
    """Neighbouring sequences [1, T] of equal length joined to [B, T] with B·T <= ``max_tokens`` (at least one each).

    The order is kept. No padding: every position of every batch is a real token.
    """
    batches: list[list[torch.Tensor]] = []
    for sequence in sequences:
        length = sequence.shape[-1]
        current = batches[-1] if batches else []
        if current and current[0].shape[-1] == length and (len(current) + 1) * length <= max_tokens:
            current.append(sequence)
        else:
            batches.append([sequence])
    return [torch.cat(batch) for batch in batches]


class LayerRunner:
    """Builds transformers' own decoder layers on demand and feeds them hidden states.

    Full sequences from position 0, causal, with the layer's sliding window where it has one. ``dtype`` is the
    arithmetic of weights and hidden states (float32 by default; transformers' RMSNorm computes in float32 always).
    """

    def __init__(self, source: ModelSource, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        self.source = source
        self.adapter: ModelAdapter = source.adapter
        self.dtype = dtype
        self.device = torch.device(device)
        self.config: Any = deepcopy(source.config)
        self.config._attn_implementation = ATTENTION_NAME
        self._rotary = self.adapter.rotary(self.config).to(self.device)

    def layer(self, index: int, tensors: Mapping[str, torch.Tensor] | None = None, copy: bool = True) -> LoadedLayer:
        """Decoder layer ``index`` with ``tensors`` (full names; all of the layer's), or with the model's own.

        ``copy=False``: use tensors of the runner's dtype and device as they are, for a layer whose weights will not be
        set, or whose tensors nobody else reads.

        A rotated layer is run by giving its fused tensors (norm weights one) and setting
        ``transforms["down"]`` of the result to the online Hadamard. Raises ResQError when a tensor is missing or not
        one of the layer's.
        """
        if tensors is None:
            tensors = self.source.layer_tensors(index)
        prefix = self.adapter.layer_prefix(index)
        expected = self.adapter.layer_shapes(index)
        for name in sorted(set(expected) ^ set(tensors)):
            state = "is missing" if name in expected else "is not one of its tensors"
            raise ResQError(f"layer {index}: tensor {name} {state}; give exactly the tensors of {prefix}*")
        module = self.adapter.empty_layer(self.config, index)
        # set_weight must not write into the caller's tensors, so copy where no cast does.
        state_dict = {
            name.removeprefix(prefix): value.to(self.device, self.dtype, copy=copy) for name, value in tensors.items()
        }
        module.load_state_dict(state_dict, assign=True)
        module.requires_grad_(False)
        return LoadedLayer(self.adapter, index, module, lambda hidden: self._positions(hidden, index))

    def _positions(self, hidden: torch.Tensor, index: int) -> dict[str, Any]:
        position_ids = torch.arange(hidden.shape[1], device=hidden.device)[None]
        build = create_causal_mask if self.adapter.sliding_window(index) is None else create_sliding_window_causal_mask
        mask = build(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=None,
            past_key_values=None,
            position_ids=position_ids,
        )
        return {
            "attention_mask": mask,
            "position_ids": position_ids,
            "position_embeddings": self._rotary(hidden, position_ids=position_ids),
        }

    @torch.no_grad()
    def embed(self, batches: Sequence[torch.Tensor], table: torch.Tensor | None = None) -> list[torch.Tensor]:
        """Hidden states [B, T, d] of token ids [B, T]; ``table`` [vocab, d] replaces the model's embedding.

        Raises ResQError for a token id beyond the embedding (the tokenizer is of another model).
        """
        weight = self.source.embedding() if table is None else table
        hiddens = []
        for ids in batches:
            if int(ids.max()) >= weight.shape[0] or int(ids.min()) < 0:
                raise ResQError(
                    f"token id {int(ids.max())} is outside the embedding of {weight.shape[0]} rows; "
                    "the tokenizer and the weights are not of the same model"
                )
            hiddens.append(torch.nn.functional.embedding(ids, weight).to(self.device, self.dtype))
        return hiddens

    @torch.no_grad()
    def head_input(self, hidden: torch.Tensor, final_norm: torch.Tensor) -> torch.Tensor:
        """What lm_head reads, [B, T, d]: the last layer's output through the final norm, whose weight is [d]."""
        norm = self.adapter.norm_module()
        norm.weight = torch.nn.Parameter(final_norm.to(self.device, self.dtype), requires_grad=False)
        normed: torch.Tensor = norm(hidden)
        return normed

    @torch.no_grad()
    def logits(
        self,
        hidden: torch.Tensor,
        final_norm: torch.Tensor | None = None,
        lm_head: torch.Tensor | None = None,
        rounding: Transform | None = None,
    ) -> torch.Tensor:
        """Logits [B, T, vocab] of the last layer's output [B, T, d]; the tensors replace the model's own.

        ``rounding``: what lm_head's input goes through first.
        """
        head = self.source.lm_head() if lm_head is None else lm_head
        normed = self.head_input(hidden, self.source.final_norm() if final_norm is None else final_norm)
        normed = normed if rounding is None else rounding(normed)
        logits = normed.new_empty(*normed.shape[:-1], len(head))
        # In blocks: the whole lm_head in float32 would be the largest tensor of all.
        for start in range(0, len(head), _HEAD_ROWS):
            rows = head[start : start + _HEAD_ROWS].to(self.device, self.dtype)
            logits[..., start : start + len(rows)] = torch.nn.functional.linear(normed, rows)
        return logits
