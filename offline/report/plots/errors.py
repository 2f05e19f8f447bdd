"""Error lines over the layers, one small panel a site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import nan

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from offline.report.plots.style import AFTER, BEFORE, MARKED_LAYERS, ROTATED, layer_axis, new_figure, styled


@dataclass(frozen=True)
class Series:
    """One line in every panel: name, colour, marker, dashes."""

    name: str
    colour: str
    marker: str
    line: str


ROUNDING = (Series("before rotation", BEFORE, "o", "-"), Series("rotated, as served", AFTER, "s", "-"))
NEAREST = Series("rotated, to nearest", ROTATED, "^", "--")
_DECADES = 50.0
Panels = Mapping[str, Sequence[Sequence[float | None]]]


def weight_series(gptq: bool) -> tuple[Series, ...]:
    """Before, rotated and as stored; of a checkpoint that is rounded to nearest the last two are one."""
    before = Series("before rotation, to nearest", BEFORE, "o", "-")
    if not gptq:
        return before, Series(NEAREST.name, AFTER, "s", "-")
    return before, NEAREST, Series("rotated, GPTQ, as served", AFTER, "s", "-")


@styled
def error_panels(panels: Panels, series: Sequence[Series]) -> Figure:
    """One panel a title: for every series one relative squared error a layer, None where nothing is quantized.

    At least one error must be positive.
    """
    rows = -(-len(panels) // 2)
    figure = new_figure(1.1 + 1.65 * rows)
    grid = figure.subplots(rows, 2, sharex=True, sharey=True, squeeze=False)
    known = [value for lines in panels.values() for line in lines for value in line if value]
    # Over many decades only powers of ten have room for their labels.
    subs = (1.0,) if max(known) / min(known) > _DECADES else (1.0, 2.0, 5.0)
    for axes, (title, lines) in zip(grid.flat, panels.items(), strict=False):
        for style, values in zip(series, lines, strict=True):
            # A log axis has no place for 0: an error of nothing is left out like one that is not there.
            heights = [100 * value if value else nan for value in values]
            marker = style.marker if len(heights) <= MARKED_LAYERS else ""
            axes.plot(
                range(len(heights)), heights, color=style.colour, marker=marker, linestyle=style.line, label=style.name
            )
        axes.set_title(title)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=subs))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    for axes in grid[-1]:
        layer_axis(axes, len(next(iter(panels.values()))[0]))
    for axes in grid[:, 0]:
        axes.set_ylabel("relative error")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=2, borderaxespad=0.1, columnspacing=1.2)
    return figure
