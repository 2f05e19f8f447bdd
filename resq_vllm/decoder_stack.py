"""Decoder layers whose tensors the kernels have checked and keep, so that a step passes its batch alone."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Sequence

import torch

from resq_vllm import ops  # noqa: F401  (loads the library)


class DecoderStack:
    """L decoder layers from the first one's q, k, v to the end of the last one, with their attention and packed cache.

    Args:
        cos_sin_cache: [positions, hd], cosines of half a head and then sines; its dtype is that of all activations.
        weights: the tensors of :func:`resq_vllm.fused_linear.between_attentions`, layer by layer; the last layer may
            have those of :func:`resq_vllm.fused_linear.decoder_mlp`.
        kv_caches: uint8 [blocks, Hkv, N, C] of every layer.
        rotations: U_C, float32 [hd, hd], of every layer, or None.
        epsilons: of the norms, in the order of the weights.
        scales: of every layer's attention.
        layouts: high dims, bits of the low ones and sliding window (-1: none) of every layer.
        query_heads: H.

    Raises:
        RuntimeError: with one sentence, where they do not fit together.

    """

    def __init__(
        self,
        cos_sin_cache: torch.Tensor,
        weights: Sequence[torch.Tensor | None],
        kv_caches: Sequence[torch.Tensor],
        rotations: Sequence[torch.Tensor | None],
        epsilons: Sequence[float],
        scales: Sequence[float],
        layouts: Sequence[int],
        query_heads: int,
    ) -> None:
        self._tensors = [cos_sin_cache, *weights, *kv_caches, *rotations]
        self._number = torch.ops.resq.decoder_stack.default(
            cos_sin_cache, weights, epsilons, kv_caches, rotations, scales, layouts, query_heads
        )
        weakref.finalize(self, torch.ops.resq.drop_decoder_stack.default, self._number).atexit = False

    def has(
        self,
        cos_sin_cache: torch.Tensor,
        weights: Sequence[torch.Tensor | None],
        kv_caches: Sequence[torch.Tensor],
        rotations: Sequence[torch.Tensor | None],
    ) -> bool:
        """Whether it was made of these very tensors (of which the memory may change, as in ``p.data = ...``)."""
        tensors = [cos_sin_cache, *weights, *kv_caches, *rotations]
        return len(tensors) == len(self._tensors) and all(map(operator.is_, tensors, self._tensors))

    def __call__(
        self,
        qkv: torch.Tensor,
        residual: torch.Tensor,
        positions: torch.Tensor,
        slot_mapping: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start_loc: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the layers for a batch, writing its keys and values to the caches.

        Args:
            qkv: [T, (H + 2·Hkv)·hd], before RoPE.
            residual: [T, hidden], the residual stream at the first layer's attention.
            positions: int64 [T].
            slot_mapping: int64, at most T, negative for none.
            block_table: int32 [sequences, blocks].
            seq_lens: int32 [sequences].
            query_start_loc: int32 [sequences + 1].

        Returns:
            The last layer's results: y (or the q, k, v after it) and the residual stream.

        Raises:
            RuntimeError: with one sentence, on a batch that does not fit.

        """
        return torch.ops.resq.run_decoder_stack.default(
            self._number, qkv, residual, positions, slot_mapping, block_table, seq_lens, query_start_loc
        )
