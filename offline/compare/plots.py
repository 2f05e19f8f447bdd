"""The comparison as pictures: perplexity against bits, gaps to bf16, and gaps on every further text."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import NullFormatter, ScalarFormatter
from matplotlib.transforms import Bbox

from offline.compare.cache import write_whole
from offline.compare.rows import BASELINE, BUDGET_BITS, CompareResult, Row
from offline.compare.ruined import note, split_ruined

DPI = 150
# Okabe and Ito's palette, which colour-blind readers can tell apart; shape and hatch say the same once more.
KINDS = {
    "best": ("#0072B2", "*", "", f"lowest within {BUDGET_BITS} bits"),
    "within": ("#E69F00", "o", "", f"within {BUDGET_BITS} bits"),
    "beyond": ("#999999", "s", "//", f"more than {BUDGET_BITS} bits in some part"),
    "baseline": ("#000000", "D", "", "not quantized"),
}
# Longer bars say only "ruined", and would flatten all others.
LONGEST_GAP = 2.5
# Points between a marker and a name that needs no line to it.
_NEAR = 9


def write_plots(result: CompareResult, output: Path) -> list[Path]:
    """Write ``compare-bits.png``, ``compare-gaps.png`` and ``compare-texts.png`` into ``output``; returns their paths.

    A plot without anything to show is not written: gaps need the row of bf16, texts need further texts.
    """
    figures = {"bits": bits_figure(result), "gaps": gaps_figure(result), "texts": texts_figure(result)}
    written: list[Path] = []
    for name, figure in figures.items():
        path = output / f"compare-{name}.png"
        if figure is None:
            # Of an earlier run in the same folder, with other rows.
            path.unlink(missing_ok=True)
            continue
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=DPI)
        write_whole(path, buffer.getvalue())
        written.append(path)
    return written


def kind(row: Row, result: CompareResult) -> str:
    """The key of KINDS that a row is drawn as."""
    if row.method == BASELINE:
        return "baseline"
    if row is result.best():
        return "best"
    return "within" if row.within() else "beyond"


def bits_figure(result: CompareResult) -> Figure | None:
    """Perplexity, on a log scale, against the mean of weight, activation and KV bits; None without a finite one.

    Ruined models are named in a corner.
    """
    rows, ruined = split_ruined(result.rows)
    if not rows:
        return None
    figure, axes = _figure(7.6, 5.2)
    for row in rows:
        colour, marker, _, _ = KINDS[kind(row, result)]
        size = 190 if marker == "*" else 60
        axes.scatter(
            row.average_bits,
            row.ppl,
            c=colour,
            marker=marker,
            s=size,
            zorder=4 if marker == "*" else 3,
            edgecolors="white",
        )
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(ScalarFormatter() if _span(rows) < 10 else NullFormatter())
    # Bits lie between 4 and 16 and crowd near 4.
    axes.set_xscale("log", base=2)
    axes.set_xticks([bits for bits in (2, 3, 4, 5, 6, 8, 12, 16) if _shown(bits, rows)])
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.12, y=0.12)
    axes.set_xlabel("mean of weight, activation and KV cache bits")
    axes.set_ylabel("perplexity")
    axes.set_title(f"{result.model}: perplexity against bits")
    present = dict.fromkeys(kind(row, result) for row in rows)
    axes.legend(handles=[_marker(name) for name in KINDS if name in present], frameon=False, fontsize=8)
    remark = note([(row.label, row.ppl) for row in ruined])
    axes.text(0.01, 0.99, remark, transform=axes.transAxes, va="top", fontsize=8, color="#606060")
    _label_points(figure, axes, rows)
    return figure


def gaps_figure(result: CompareResult) -> Figure | None:
    """One bar a method: ln(perplexity) above bf16; None without bf16 or without another row."""
    rows = [row for row in result.rows if row.method != BASELINE and result.gap(row) is not None]
    if not rows:
        return None
    figure, axes = _figure(7.6, 1.6 + 0.32 * len(rows))
    _bars(axes, result, rows, None)
    axes.set_xlabel("gap to bf16: ln(perplexity) − ln(perplexity of bf16)")
    axes.set_title(f"{result.model}: what quantization costs")
    present = {kind(row, result) for row in rows}
    axes.legend(handles=[_patch(name) for name in KINDS if name in present], frameon=False, fontsize=8)
    return figure


def texts_figure(result: CompareResult) -> Figure | None:
    """The gaps on every further text, one panel a text; None without texts or without their bf16 figures."""
    rows = [row for row in result.rows if row.method != BASELINE]
    texts = [text for text in result.texts if any(result.gap(row, text) is not None for row in rows)]
    if not texts:
        return None
    across = min(3, len(texts))
    down = math.ceil(len(texts) / across)
    figure = Figure(figsize=(2.2 + 3.0 * across, 0.9 + down * (0.8 + 0.24 * len(rows))), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(down, across, squeeze=False, sharey=True)
    for axes, text in zip(grid.flat, texts, strict=False):
        _plain(axes)
        _bars(axes, result, rows, text)
        axes.set_title(text)
    for axes in grid.flat[len(texts) :]:
        axes.set_visible(False)
    figure.suptitle(f"{result.model}: gap to bf16 in ln(perplexity), by text")
    return figure


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    _plain(axes)
    return figure, axes


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)


def _bars(axes: Axes, result: CompareResult, rows: Sequence[Row], text: str | None) -> None:
    """Horizontal bars in the table's order from top to bottom, each with its figure; rows without one stay empty."""
    gaps = [result.gap(row, text) for row in rows]
    longest = max((gap for gap in gaps if gap is not None and gap <= LONGEST_GAP), default=LONGEST_GAP)
    limit = 1.02 * (LONGEST_GAP if any(gap is not None and gap > LONGEST_GAP for gap in gaps) else max(longest, 0.01))
    for place, (row, gap) in enumerate(zip(rows, gaps, strict=True)):
        if gap is None:
            continue
        colour, _, hatch, _ = KINDS[kind(row, result)]
        shown = min(gap, limit)
        axes.barh(place, shown, color=colour, hatch=hatch, edgecolor="white", height=0.72)
        note = f"{gap:.3f}" if gap <= limit else "→ ∞" if math.isinf(gap) else f"→ {gap:.1f}"
        axes.annotate(note, (max(shown, 0), place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [row.label for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    smallest = min((gap for gap in gaps if gap is not None), default=0)
    axes.set_xlim(min(0, 1.1 * smallest), 1.2 * limit)
    axes.grid(False, axis="y")


def _marker(name: str) -> Line2D:
    colour, marker, _, label = KINDS[name]
    return Line2D([], [], linestyle="", color=colour, marker=marker, markersize=11 if marker == "*" else 7, label=label)


def _patch(name: str) -> Patch:
    colour, _, hatch, label = KINDS[name]
    return Patch(facecolor=colour, hatch=hatch, edgecolor="white", label=label)


def _span(rows: Sequence[Row]) -> float:
    return max(row.ppl for row in rows) / min(row.ppl for row in rows)


def _shown(bits: int, rows: Sequence[Row]) -> bool:
    return 0.9 * min(row.average_bits for row in rows) <= bits <= 1.1 * max(row.average_bits for row in rows)


def _label_points(figure: Figure, axes: Axes, rows: Sequence[Row]) -> None:
    """Put each point's name beside it where it covers no other name and no point, else with a thin line to it."""
    figure.draw_without_rendering()
    points = [axes.transData.transform((row.average_bits, row.ppl)) for row in rows]
    taken = [Bbox.from_extents(x - 9, y - 9, x + 9, y + 9) for x, y in points]
    frame = axes.get_window_extent()
    legend = axes.get_legend()
    if legend is not None:
        taken.append(legend.get_window_extent())
    around = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))
    offsets = [(reach * dx, reach * dy) for reach in (_NEAR, 18, 30, 44, 60, 80) for dx, dy in around]
    for row in sorted(rows, key=lambda row: row.ppl):
        best: tuple[float, tuple[int, int]] = (math.inf, offsets[0])
        for offset in offsets:
            label = _annotate(axes, row, offset)
            box = label.get_window_extent()
            overlap = sum(_overlap(box, other) for other in taken) + 4 * _outside(box, frame)
            label.remove()
            if overlap < best[0]:
                best = (overlap, offset)
            if overlap == 0:
                break
        taken.append(_annotate(axes, row, best[1]).get_window_extent())


def _annotate(axes: Axes, row: Row, offset: tuple[int, int]):  # type: ignore[no-untyped-def]
    dx, dy = offset
    beside = abs(dx) + abs(dy) <= _NEAR
    line = None if beside else {"arrowstyle": "-", "color": "#808080", "linewidth": 0.7, "shrinkA": 0, "shrinkB": 3}
    return axes.annotate(
        row.label,
        (row.average_bits, row.ppl),
        xytext=offset,
        textcoords="offset points",
        ha="left" if dx > 0 else "right" if dx < 0 else "center",
        va="center" if dy == 0 else "bottom" if dy > 0 else "top",
        fontsize=8,
        arrowprops=line,
    )


def _overlap(one: Bbox, other: Bbox) -> float:
    shared = Bbox.intersection(one, other)
    return 0.0 if shared is None else shared.width * shared.height


def _outside(box: Bbox, frame: Bbox) -> float:
    return box.width * box.height - _overlap(box, frame)
