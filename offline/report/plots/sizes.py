"""Bytes as horizontal bars."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator

from offline.report.plots.style import AFTER, NEUTRAL, new_figure, styled
from offline.report.text import EXACT_BYTES, byte_size


@styled
def byte_bars(parts: Sequence[tuple[str, int]], neutral: Sequence[str] = ()) -> Figure:
    """One labelled bar for each (name, bytes), top to bottom; names in ``neutral`` are drawn grey."""
    figure = new_figure(0.75 + 0.36 * len(parts))
    axes = figure.subplots()
    names, sizes = [name for name, _ in parts], [size for _, size in parts]
    colours = [NEUTRAL if name in neutral else AFTER for name in names]
    bars = axes.barh(names, sizes, color=colours, height=0.68)
    axes.bar_label(bars, [byte_size(size) for size in sizes], padding=4, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.2 * max(sizes))
    axes.xaxis.set_major_formatter(lambda value, _: byte_size(round(value)))
    axes.xaxis.set_major_locator(_binary_ticks(max(sizes)))
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("bytes")
    return figure


def _binary_ticks(largest: int) -> MultipleLocator:
    """At most four ticks, at round numbers of the unit that :func:`byte_size` prints."""
    unit = 1
    while largest >= max(EXACT_BYTES, 1000 * unit) and unit < 1 << 30:
        unit *= 1024
    steps = [m * 10**e * unit for e in range(-1, 4) for m in (1, 2, 5)]
    return MultipleLocator(next(step for step in steps if largest / step <= 3.5))
