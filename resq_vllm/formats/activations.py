"""Where quantized activations lie in memory on a GPU: codes in part order, padded (csrc/cuda/formats.h in Python).

A row is the low part's codes, then the high part's. In a part every run begins at a multiple of 32 columns; the part's
row is padded to a multiple of 128 bytes; padding codes are 0. A low part whose groups all have 4 bits can be stored two
codes a byte, the even column in the low nibble.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch

from resq_vllm.formats.plan import LOW, LinearPlan, Segment

RUN_COLUMNS = 32
PITCH_BYTES = 128


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class ActivationLayout:
    """The layout of a plan's codes; ``nibbles``: 4-bit low parts two codes a byte."""

    plan: LinearPlan
    nibbles: bool = False

    @cached_property
    def packed_low(self) -> bool:
        """Whether the low part is stored two codes a byte."""
        return self.nibbles and all(self.plan.group_bits[r.group] == 4 for r in self.plan.runs if r.part == LOW)

    @cached_property
    def places(self) -> tuple[int, ...]:
        """First padded column in its part of every run."""
        used, places = [0, 0], []
        for run in self.plan.runs:
            places.append(used[run.part])
            used[run.part] += _round_up(run.length, RUN_COLUMNS)
        return tuple(places)

    @cached_property
    def pitches(self) -> tuple[int, int]:
        """Bytes of the low and of the high part's row."""
        used = [0, 0]
        for run in self.plan.runs:
            used[run.part] += _round_up(run.length, RUN_COLUMNS)
        return _round_up(used[0] // 2 if self.packed_low else used[0], PITCH_BYTES), _round_up(used[1], PITCH_BYTES)

    @property
    def row_bytes(self) -> int:
        """Bytes of a token's row."""
        return sum(self.pitches)

    @cached_property
    def columns(self) -> torch.Tensor:
        """The place of each of x's columns in a row of one code a byte, int64 [K]."""
        low = self.pitches[0] * (2 if self.packed_low else 1)
        at = torch.empty(self.plan.columns, dtype=torch.int64)
        for part in (0, 1):
            index = torch.tensor(self.plan.part_index(part), dtype=torch.int64)
            for run, place in zip(self.plan.runs, self.places, strict=True):
                if run.part == part:
                    start = place + (low if part else 0)
                    at[index[run.start : run.start + run.length]] = torch.arange(start, start + run.length)
        return at

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes uint8 [M, K] in x's column order -> rows uint8 [M, row_bytes]."""
        low = self.pitches[0] * (2 if self.packed_low else 1)
        rows = torch.zeros(codes.shape[0], low + self.pitches[1], dtype=torch.uint8)
        rows[:, self.columns] = codes
        if not self.packed_low:
            return rows
        return torch.cat((rows[:, 0:low:2] | rows[:, 1:low:2] << 4, rows[:, low:]), dim=1)

    def unpack(self, rows: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`pack`."""
        if self.packed_low:
            packed = rows[:, : self.pitches[0]]
            low = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)
            rows = torch.cat((low, rows[:, self.pitches[0] :]), dim=1)
        return rows[:, self.columns]


@lru_cache(maxsize=256)
def activation_layout(
    segments: tuple[int, ...], group_bits: tuple[int, ...], hadamard_groups: int, weight_group: int, nibbles: bool
) -> ActivationLayout:
    """The layout for a plan as the ops are told it: flat (columns, part, group) triples."""
    triples = zip(segments[0::3], segments[1::3], segments[2::3], strict=True)
    plan = LinearPlan(tuple(Segment(*triple) for triple in triples), group_bits, hadamard_groups, weight_group)
    return ActivationLayout(plan, nibbles)
