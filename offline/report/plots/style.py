"""One look for every figure, and figures as PNG."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart with any colour vision, and in grey by their lightness and markers.
BEFORE, ROTATED, AFTER = "#d55e00", "#009e73", "#0072b2"
HIGH_PART = "#e69f00"
NEUTRAL = "#8a94a3"
INK, FAINT = "#1f2933", "#d9dee5"
LAYER_RAMP = "viridis"
# A figure is shown 340 to 560 CSS pixels wide: at this size its 10 pt text stays readable at both ends.
WIDTH = 4.9
DPI = 200
# Beyond this many layers markers would hide the lines.
MARKED_LAYERS = 40

# Any: matplotlib types the names one by one.
_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": NEUTRAL,
    "axes.linewidth": 0.8,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}
Arguments = ParamSpec("Arguments")


def styled(draw: Callable[Arguments, Figure]) -> Callable[Arguments, Figure]:
    """Run a drawing function in the common style."""

    @wraps(draw)
    def wrapper(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Figure:
        with mpl.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return wrapper


def new_figure(height: float) -> Figure:
    """A figure of the common width, ``height`` in inches, laid out so that nothing is cut off."""
    return Figure(figsize=(WIDTH, height), layout="constrained")


def layer_axis(axes: Axes, layers: int) -> None:
    """x = decoder layers 0 … L−1, with a few whole-numbered ticks."""
    step = max(1, -(-layers // 8))
    axes.set_xticks(range(0, layers, step))
    axes.set_xlim(-0.4, layers - 0.6)
    axes.set_xlabel("decoder layer")


def png(figure: Figure) -> bytes:
    """The figure as a PNG, the same bytes for the same numbers."""
    buffer = io.BytesIO()
    with mpl.rc_context(_STYLE):
        # matplotlib signs its files with a version and an address; a report names no site.
        figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()
