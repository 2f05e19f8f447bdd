"""Perplexity against average bits, one labelled point a method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from offline.compare.ruined import note, split_ruined
from offline.report.comparison import Row
from offline.report.plots.style import AFTER, BEFORE, INK, NEUTRAL, new_figure, styled

_LABEL_POINTS, _LABEL_LENGTH = 11.0, 60.0  # of a label, in points
_GAP, _GAP_MOVED = 8.0, 16.0  # between a marker and its label
_ROOM = 0.75  # of the picture's width: a point left of it has room for its label on the right


@styled
def perplexity_scatter(rows: Sequence[Row]) -> Figure:
    """This project's methods blue, 16 bits grey, the others orange; ruined models are named at the top.

    At least one of ``rows`` has a finite perplexity.
    """
    shown, ruined = split_ruined(sorted(rows, key=lambda row: row.ppl))
    figure = new_figure(4.4)
    axes = figure.subplots()
    for row in shown:
        colour, marker = _look(row.method)
        axes.plot(row.average_bits, row.ppl, marker=marker, color=colour, markersize=7, linestyle="none")
    axes.margins(y=0.08)
    axes.set_title(note([(row.name, row.ppl) for row in ruined]), fontsize=9, fontweight="normal", color=INK)
    bits = [row.average_bits for row in shown]
    # Bits lie between 4 and 16 and crowd near 4.
    axes.set_xscale("log", base=2)
    axes.set_xlim(min(bits) / 1.1, max(bits) * 1.1)
    axes.set_xticks([tick for tick in (2, 3, 4, 5, 6, 8, 12, 16) if min(bits) / 1.1 <= tick <= max(bits) * 1.1])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("average bits of weights, activations and KV cache")
    axes.set_ylabel("perplexity (lower is better)")
    figure.draw_without_rendering()
    width = axes.get_window_extent().width
    points = {row.method: axes.transData.transform((row.average_bits, row.ppl)) * 72 / figure.dpi for row in shown}
    for column in _columns(shown, {method: float(point[0]) for method, point in points.items()}):
        # Labels stand on the right of their points where there is room.
        right = axes.transData.transform((column[-1].average_bits, 1))[0] <= axes.get_window_extent().x0 + _ROOM * width
        heights = [float(points[row.method][1]) for row in column]
        for row, place in zip(column, spread(heights, _LABEL_POINTS), strict=True):
            x, y = points[row.method]
            # Past every marker at the label's height.
            level = [points[r.method][0] for r in column if abs(points[r.method][1] - place) < _LABEL_POINTS]
            start = max([x, *level]) if right else min([x, *level])
            moved = abs(place - y) > 1 or abs(start - x) > 1
            gap = _GAP_MOVED if moved else _GAP
            axes.annotate(
                row.name,
                (row.average_bits, row.ppl),
                xytext=(start - x + (gap if right else -gap), place - y),
                textcoords="offset points",
                ha="left" if right else "right",
                va="center",
                fontsize=8,
                color=INK,
                arrowprops={"arrowstyle": "-", "color": NEUTRAL, "lw": 0.6, "shrinkB": 4} if moved else None,
            )
    return figure


def _columns(rows: Sequence[Row], x: Mapping[str, float]) -> list[list[Row]]:
    """Rows whose labels could meet, in the order given: their points' ``x`` lie closer than a label is long."""
    columns: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: x[row.method]):
        if columns and x[row.method] - x[columns[-1][-1].method] < _LABEL_LENGTH:
            columns[-1].append(row)
        else:
            columns.append([row])
    return [[row for row in rows if row in column] for column in columns]


def spread(places: Sequence[float], distance: float) -> list[float]:
    """Ascending ``places`` moved as little as need be (in squares) so that neighbours are ``distance`` apart."""
    groups: list[tuple[float, int]] = []  # (mean of its places' offsets, how many)
    for index, place in enumerate(places):
        mean, count = place - index * distance, 1
        while groups and groups[-1][0] > mean:
            other, more = groups.pop()
            mean, count = (mean * count + other * more) / (count + more), count + more
        groups.append((mean, count))
    means = [mean for mean, count in groups for _ in range(count)]
    return [mean + index * distance for index, mean in enumerate(means)]


def _look(method: str) -> tuple[str, str]:
    if method.startswith("resq"):
        return AFTER, "s"
    return (NEUTRAL, "D") if method in ("bf16", "fp16") else (BEFORE, "o")
