"""A stack of small decoder layers with caches and a batch, for the tests of what runs it as one op."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from resq_vllm import fused_linear, ops, reference
from resq_vllm.formats.kv_layout import KVLayout
from resq_vllm.formats.metadata import LinearSite
from resq_vllm.formats.plan import linear_plan
from tests.csrc.support import Weights, generator

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM, BLOCK = 128, 256, 4, 2, 32, 16
WIDTH = (HEADS + 2 * KV_HEADS) * HEAD_DIM
EPSILON, SCALE = 1e-5, HEAD_DIM**-0.5


def cos_sin_cache(positions: int, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    angles = torch.outer(torch.arange(positions).float(), 10000.0 ** -torch.linspace(0, 1, head_dim // 2))
    return torch.cat((angles.cos(), angles.sin()), dim=-1).to(dtype)


def weights_of(columns: int, outputs: int, seed: int, hadamard_groups: int = 0) -> Weights:
    if hadamard_groups:
        site = LinearSite(low=columns, high=0, scales="block", hadamard_groups=hadamard_groups)
    else:
        site = LinearSite(low=columns - columns // 8, high=columns // 8)
    return Weights(linear_plan(site, columns, 64), outputs, 4, seed)


def layer_of(w: Weights, bias: torch.Tensor | None = None) -> fused_linear.Layer:
    return w.packed, w.scales, w.sums, bias, w.words, w.arguments[-1]


@dataclass
class Stack:
    """Layers with caches of their own, one batch for all of them."""

    dtype: torch.dtype
    starts: list[int]  # query_start_loc
    lens: list[int]
    windows: list[int]
    ends_in_mlp: bool = True
    intermediate: int = INTERMEDIATE
    layers: list[tuple[Any, ...]] = field(default_factory=list)

    def __post_init__(self) -> None:
        g, tokens = generator(3), self.starts[-1]
        self.qkv, self.residual = (torch.randn(tokens, n, generator=g).to(self.dtype) for n in (WIDTH, HIDDEN))
        table = torch.randperm(24, generator=g).int().view(4, 6)
        self.block_table = table[: len(self.lens)]
        counts = [b - a for a, b in zip(self.starts, self.starts[1:], strict=False)]
        of_sequence = zip(self.block_table.long(), self.lens, counts, strict=True)
        position = [(row, torch.arange(length - count, length)) for row, length, count in of_sequence]
        self.positions = torch.cat([p for _, p in position])
        self.slots = torch.cat([row[p // BLOCK] * BLOCK + p % BLOCK for row, p in position])
        self.cache = cos_sin_cache(96, HEAD_DIM, self.dtype)
        self.layouts = [KVLayout(HEAD_DIM, 4, 4 if i % 2 == 0 else 8) for i in range(len(self.windows))]
        norm = torch.rand(HIDDEN, generator=g).to(self.dtype)
        bias = torch.randn(WIDTH, generator=g).to(self.dtype)
        for i in range(len(self.windows)):
            o = layer_of(weights_of(HEADS * HEAD_DIM, HIDDEN, 4 * i))
            up, down = (
                weights_of(HIDDEN, 2 * self.intermediate, 4 * i + 1),
                weights_of(self.intermediate, HIDDEN, 4 * i + 2, 4),
            )
            qkv = layer_of(weights_of(HIDDEN, WIDTH, 4 * i + 3), bias)
            self.layers.append((o, norm, EPSILON, layer_of(up), layer_of(down), norm, EPSILON, qkv))
        self.rotations = [
            torch.linalg.qr(torch.randn(HEAD_DIM, HEAD_DIM, generator=g))[0].contiguous() if i else None
            for i in range(len(self.windows))
        ]

    def caches(self) -> list[torch.Tensor]:
        return [torch.zeros(24, KV_HEADS, BLOCK, lay.bytes_per_token, dtype=torch.uint8) for lay in self.layouts]

    @property
    def batch(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        lens, starts = (torch.tensor(values, dtype=torch.int32) for values in (self.lens, self.starts))
        return self.slots, self.block_table, lens, starts

    def ends(self, i: int) -> bool:
        return self.ends_in_mlp and i + 1 == len(self.layers)

    def separately(self, caches: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        x, residual, tokens = self.qkv, self.residual, self.starts[-1]
        for i, layer in enumerate(self.layers):
            heads = reference.rope(x, self.positions, self.cache, HEADS + KV_HEADS).unflatten(1, (-1, HEAD_DIM))
            query, key, value = heads.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
            out = torch.empty(tokens, HEADS, HEAD_DIM, dtype=self.dtype)
            slots, table, lens, starts = self.batch
            lay, batch = self.layouts[i], (slots, table, lens, starts, self.rotations[i])
            layout = lay.high, lay.low_bits, self.windows[i]
            ops.kv_write_attention(query, key, value, caches[i], out, *batch, SCALE, *layout)
            attended = out.flatten(1)
            if self.ends(i):
                return fused_linear.decoder_mlp(attended, residual, *layer[:5])
            x, residual = fused_linear.between_attentions(attended, residual, *layer)
        return x, residual

    def arguments(self, caches: list[torch.Tensor]) -> dict[str, Any]:
        weights: list[torch.Tensor | None] = []
        epsilons = []
        for i, layer in enumerate(self.layers):
            for part in layer[:5] if self.ends(i) else layer:
                if isinstance(part, float):
                    epsilons.append(part)
                else:
                    weights += part if isinstance(part, tuple) else [part]
        layouts = [(lay.high, lay.low_bits, w) for lay, w in zip(self.layouts, self.windows, strict=True)]
        return {
            "qkv": self.qkv,
            "residual": self.residual,
            "positions": self.positions,
            "cos_sin_cache": self.cache,
            "weights": weights,
            "epsilons": epsilons,
            "kv_caches": caches,
            "rotations": self.rotations,
            "scales": [SCALE] * len(self.layers),
            "layouts": [n for layout in layouts for n in layout],
            **dict(zip(("slot_mapping", "block_table", "seq_lens", "query_start_loc"), self.batch, strict=True)),
            "query_heads": HEADS,
        }
