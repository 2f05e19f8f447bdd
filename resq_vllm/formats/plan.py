"""How a linear layer's input columns become integer GEMM runs.

A *segment* is a stretch of x's columns with one activation scale (its *group*) that meets one weight part (0 low,
1 high). Each part lists its columns in x's order, so the o_proj input, head by head [low | high], needs no reordering
at run time: its low columns are simply the low part's next columns. Segments of one part that follow each other there
and share a group merge into a *run*: one exact int32 accumulation with one activation scale and one weight scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from resq_vllm.errors import ResQError
from resq_vllm.formats.metadata import LinearSite, high_count
from resq_vllm.hadamard import hadamard_order

LOW, HIGH = 0, 1


@dataclass(frozen=True)
class Segment:
    """``columns`` consecutive columns of x, quantized with activation group ``group``, multiplied with ``part``."""

    columns: int
    part: int
    group: int


@dataclass(frozen=True)
class Run:
    """Columns [start, start+length) of weight part ``part``; all of them carry activation group ``group``."""

    part: int
    group: int
    start: int
    length: int


@dataclass(frozen=True)
class LinearPlan:
    """The executable form of a :class:`LinearSite` for one rank's input width.

    Attributes:
        segments: in x-column order (after the online Hadamard), covering every column.
        group_bits: bits of each activation group.
        hadamard_groups: blocks of the online Hadamard, 0 for none.

    """

    segments: tuple[Segment, ...]
    group_bits: tuple[int, ...]
    hadamard_groups: int = 0

    @cached_property
    def columns(self) -> int:
        return sum(s.columns for s in self.segments)

    @cached_property
    def part_columns(self) -> tuple[int, int]:
        """Columns of the low and of the high part."""
        low = sum(s.columns for s in self.segments if s.part == LOW)
        return low, self.columns - low

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """Merged segments, in the order of their first segment: the order of the float32 sums in the epilogue."""
        runs: list[Run] = []
        last: dict[int, int] = {}
        filled = [0, 0]
        for s in self.segments:
            index = last.get(s.part)
            if index is not None and runs[index].group == s.group:
                run = runs[index]
                runs[index] = Run(run.part, run.group, run.start, run.length + s.columns)
            else:
                last[s.part] = len(runs)
                runs.append(Run(s.part, s.group, filled[s.part], s.columns))
            filled[s.part] += s.columns
        return tuple(runs)

    @cached_property
    def hadamard_k(self) -> int:
        """The dense order k of a Hadamard block k·2^m (1: a pure power of two), or 0 without online Hadamard."""
        return hadamard_order(self.columns // self.hadamard_groups) if self.hadamard_groups else 0

    def flat_segments(self) -> list[int]:
        """Segments as the ops take them: columns, part, group, columns, part, group, …"""
        return [value for s in self.segments for value in (s.columns, s.part, s.group)]

    def part_index(self, part: int) -> list[int]:
        """x's column numbers of one part, in the part's order."""
        index: list[int] = []
        start = 0
        for s in self.segments:
            if s.part == part:
                index.extend(range(start, start + s.columns))
            start += s.columns
        return index


def _parts(low: int, high: int, low_group: int, high_group: int) -> list[Segment]:
    return [s for s in (Segment(low, LOW, low_group), Segment(high, HIGH, high_group)) if s.columns]


def linear_plan(site: LinearSite, columns: int, head_dim: int) -> LinearPlan:
    """The plan of ``site`` for an input of ``columns`` columns (this rank's share).

    Raises ResQError when the share does not hold whole heads or whole Hadamard blocks.
    """
    total = site.low + site.high
    if columns <= 0 or total % columns:
        raise ResQError(f"an input of {columns} columns is no equal share of the layer's {total}")
    share = total // columns
    if site.order == "heads":
        return _head_plan(site, columns, head_dim)
    if site.hadamard_groups % share:
        raise ResQError(
            f"hadamard_groups = {site.hadamard_groups} does not divide by the tensor-parallel degree {share}; "
            f"serve with a degree that divides it, or quantize again with --max-tp {share}"
        )
    if site.scales == "block":
        groups = site.hadamard_groups // share
        width = columns // groups
        high = site.high // site.hadamard_groups
        segments = [s for g in range(groups) for s in _parts(width - high, high, g, groups + g)]
        bits = [site.act_low_bits] * groups + ([site.act_high_bits] * groups if high else [])
        return LinearPlan(tuple(segments), tuple(bits), groups)
    low, high = site.low // share, site.high // share
    if site.scales == "token":
        return LinearPlan(tuple(_parts(low, high, 0, 0)), (site.act_low_bits,), site.hadamard_groups // share)
    bits = [b for b, width in ((site.act_low_bits, low), (site.act_high_bits, high)) if width]
    return LinearPlan(tuple(_parts(low, high, 0, len(bits) - 1)), tuple(bits), site.hadamard_groups // share)


def _head_plan(site: LinearSite, columns: int, head_dim: int) -> LinearPlan:
    if columns % head_dim:
        raise ResQError(f"an input of {columns} columns does not hold whole heads of {head_dim} dims")
    heads = columns // head_dim
    high = site.high * head_dim // (site.low + site.high)
    low = head_dim - high
    if site.scales == "token":
        return LinearPlan(tuple(_parts(low, high, 0, 0)) * heads, (site.act_low_bits,))
    pair = [b for b, width in ((site.act_low_bits, low), (site.act_high_bits, high)) if width]
    if site.scales == "part":
        return LinearPlan(tuple(_parts(low, high, 0, len(pair) - 1)) * heads, tuple(pair))
    step = len(pair)
    segments = [s for h in range(heads) for s in _parts(low, high, h * step, h * step + step - 1)]
    return LinearPlan(tuple(segments), tuple(pair) * heads)


__all__ = ["HIGH", "LOW", "LinearPlan", "Run", "Segment", "high_count", "linear_plan"]
