"""How a linear layer's input columns become integer GEMM runs.

A *segment* is a stretch of x's columns with one activation scale (its *group*) that meets one weight part (0 low,
1 high). Each part lists its columns in x's order, so the o_proj input, head by head [low | high], needs no reordering
at run time: its low columns are simply the low part's next columns. Segments of one part that follow each other there
and share a group merge into a *run*: one exact int32 accumulation with one activation scale and one weight scale. Where
the low part has a weight scale per group of columns, runs end at the groups' boundaries too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
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
    """Columns [start, start+length) of weight part ``part``; all of them carry activation group ``group``.

    ``scale_row``: the run's row in the weight scales: low part first (one row, or one a weight group), high part last.
    """

    part: int
    group: int
    start: int
    length: int
    scale_row: int


@dataclass(frozen=True)
class LinearPlan:
    """The executable form of a :class:`LinearSite` for one rank's input width.

    Attributes:
        segments: in x-column order (after the online Hadamard), covering every column.
        group_bits: bits of each activation group.
        hadamard_groups: blocks of the online Hadamard, 0 for none.
        weight_group: columns of the low part that share a weight scale, 0 for all of them.

    """

    segments: tuple[Segment, ...]
    group_bits: tuple[int, ...]
    hadamard_groups: int = 0
    weight_group: int = 0

    @cached_property
    def columns(self) -> int:
        return sum(s.columns for s in self.segments)

    @cached_property
    def part_columns(self) -> tuple[int, int]:
        """Columns of the low and of the high part."""
        low = sum(s.columns for s in self.segments if s.part == LOW)
        return low, self.columns - low

    @cached_property
    def scale_rows(self) -> int:
        """Rows of the weight scales: those of the low part (one even where it has no columns), and the high part's."""
        return (self.part_columns[LOW] // self.weight_group if self.weight_group else 1) + 1

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """Merged segments, in the order of their first segment: the order of the float32 sums in the epilogue."""
        runs: list[Run] = []
        last: dict[int, int] = {}
        filled = [0, 0]
        for s in self.segments:
            left = s.columns
            while left:
                start = filled[s.part]
                grouped = self.weight_group if s.part == LOW else 0
                columns = min(left, grouped - start % grouped) if grouped else left
                index = last.get(s.part)
                if index is not None and runs[index].group == s.group and not (grouped and start % grouped == 0):
                    runs[index] = replace(runs[index], length=runs[index].length + columns)
                else:
                    row = self.scale_rows - 1 if s.part == HIGH else start // grouped if grouped else 0
                    last[s.part] = len(runs)
                    runs.append(Run(s.part, s.group, start, columns, row))
                filled[s.part] += columns
                left -= columns
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

    Raises ResQError when the share does not hold whole heads, Hadamard blocks, scale blocks or weight groups.
    """
    total = site.low + site.high
    if columns <= 0 or total % columns:
        raise ResQError(f"an input of {columns} columns is no equal share of the layer's {total}")
    share = total // columns
    if site.order == "heads":
        plan = _head_plan(site, columns, head_dim)
    else:
        _require_share("hadamard_groups", site.hadamard_groups, share)
        _require_share("scale_groups", site.scale_groups, share)
        plan = _block_plan(site, share) if site.scales == "block" else _contiguous_plan(site, share)
    if not site.weight_group:
        return plan
    if plan.part_columns[LOW] % site.weight_group:
        raise ResQError(
            f"weight_group = {site.weight_group} does not divide the {plan.part_columns[LOW]} low columns of a rank at "
            f"tensor-parallel degree {share}; serve with a lower degree, or quantize again with --max-tp {share}"
        )
    return replace(plan, weight_group=site.weight_group)


def _require_share(field: str, groups: int, share: int) -> None:
    if groups % share:
        raise ResQError(
            f"{field} = {groups} does not divide by the tensor-parallel degree {share}; "
            f"serve with a degree that divides it, or quantize again with --max-tp {share}"
        )


def _block_plan(site: LinearSite, share: int) -> LinearPlan:
    groups = site.scale_blocks // share
    low, high = site.low // site.scale_blocks, site.high // site.scale_blocks
    # Low groups 0 … G−1, then the high ones; a part without columns has none.
    first_high = groups if low else 0
    segments = [s for g in range(groups) for s in _parts(low, high, g, first_high + g)]
    bits = [b for b, width in ((site.act_low_bits, low), (site.act_high_bits, high)) if width for _ in range(groups)]
    return LinearPlan(tuple(segments), tuple(bits), site.hadamard_groups // share)


def _contiguous_plan(site: LinearSite, share: int) -> LinearPlan:
    low, high, hadamard_groups = site.low // share, site.high // share, site.hadamard_groups // share
    if site.scales == "token":
        return LinearPlan(tuple(_parts(low, high, 0, 0)), (site.act_low_bits,), hadamard_groups)
    bits = [b for b, width in ((site.act_low_bits, low), (site.act_high_bits, high)) if width]
    return LinearPlan(tuple(_parts(low, high, 0, len(bits) - 1)), tuple(bits), hadamard_groups)


def _head_plan(site: LinearSite, columns: int, head_dim: int) -> LinearPlan:
    if columns % head_dim:
        raise ResQError(f"an input of {columns} columns does not hold whole heads of {head_dim} dims")
    heads = columns // head_dim
    high = site.high * head_dim // (site.low + site.high)
    low = head_dim - high
    if site.scales == "token":
        return LinearPlan(tuple(_parts(low, high, 0, 0)) * heads, (site.act_low_bits,))
    pair = [b for b, width in ((site.act_low_bits, low), (site.act_high_bits, high)) if width]
    block = _heads_per_block(site, heads, (site.low + site.high) // head_dim)
    step = len(pair)
    segments = [s for h in range(heads) for s in _parts(low, high, h // block * step, h // block * step + step - 1)]
    return LinearPlan(tuple(segments), tuple(pair) * (heads // block))


def _heads_per_block(site: LinearSite, heads: int, total: int) -> int:
    """Heads of a rank's ``heads`` that share activation scales; the layer has ``total``."""
    if site.scales == "part":
        return heads
    if site.scales == "head":
        return 1
    if total % site.scale_groups:
        raise ResQError(f"scale_groups = {site.scale_groups} does not divide {total} heads; quantize the model again")
    # A rank may hold less than a block (kv heads shared by ranks): its heads then have a scale of their own.
    block = min(total // site.scale_groups, heads)
    if heads % block:
        raise ResQError(
            f"a rank's {heads} heads hold no whole number of scale blocks of {block} heads; serve with a "
            "tensor-parallel degree that divides scale_groups"
        )
    return block


__all__ = ["HIGH", "LOW", "LinearPlan", "Run", "Segment", "high_count", "linear_plan"]
