"""Eigenvalue spectra of the bases, and how much the high-precision part captures."""

from __future__ import annotations

from typing import Any

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure

from offline.report.plots.style import (
    AFTER,
    BEFORE,
    HIGH_PART,
    INK,
    LAYER_RAMP,
    MARKED_LAYERS,
    NEUTRAL,
    layer_axis,
    new_figure,
    styled,
)

# Second moments below this share of the largest are rounding noise of their float64 sum.
_NOISE = 1e-14
# The ramp's last tenth is too pale on white.
_RAMP_END = 0.9


@styled
def spectrum(variance: torch.Tensor, high: int) -> Figure:
    """One curve: ``variance`` [n] ascending, the last ``high`` directions shaded."""
    figure = new_figure(3.5)
    axes = figure.subplots()
    _curve(axes, variance, AFTER, 2.0)
    _finish(axes, variance.shape[-1], high)
    return figure


@styled
def layer_spectra(variance: torch.Tensor, high: int) -> Figure:
    """One curve a layer: ``variance`` [L, n] ascending, coloured from the first layer to the last."""
    figure = new_figure(3.5)
    axes = figure.subplots()
    layers = variance.shape[0]
    ramp = colormaps[LAYER_RAMP]
    norm = Normalize(0, max(1, layers - 1))
    for layer, values in enumerate(variance):
        _curve(axes, values, ramp(_RAMP_END * norm(layer)), 1.2)
    _finish(axes, variance.shape[-1], high)
    shown = ListedColormap([ramp(_RAMP_END * shade / 255) for shade in range(256)])
    bar = figure.colorbar(ScalarMappable(norm, shown), ax=axes, pad=0.02, aspect=30)
    bar.set_label("decoder layer")
    bar.set_ticks(list(range(0, layers, max(1, -(-layers // 6)))))
    bar.outline.set_visible(False)
    return figure


def _curve(axes: Axes, variance: torch.Tensor, colour: Any, width: float) -> None:
    floor = float(variance.max()) * _NOISE
    values = torch.where(variance > floor, variance, torch.nan)
    axes.plot(range(1, len(values) + 1), values.tolist(), color=colour, linewidth=width)


def _finish(axes: Axes, dim: int, high: int) -> None:
    axes.set_yscale("log")
    axes.set_xlim(1, dim)
    axes.set_xlabel("direction, in ascending order")
    axes.set_ylabel("second moment (log scale)")
    if high:
        axes.axvspan(dim - high + 0.5, dim, color=HIGH_PART, alpha=0.22, linewidth=0)
        axes.annotate(
            f"{high} kept\nat 8 bits",
            (dim - high, 0.04),
            xycoords=("data", "axes fraction"),
            xytext=(-5, 0),
            textcoords="offset points",
            ha="right",
            va="bottom",
            fontsize=9,
            color=INK,
        )


@styled
def captured_variance(residual: float, value: torch.Tensor, key: torch.Tensor, share: float) -> Figure:
    """Share of the second moment in the high part, in percent.

    residual: of U_A, one figure for the model; value [L, kv] of U_B; key [L] of U_C; share: of the dims that are high,
    which is what an arbitrary choice would capture.
    """
    figure = new_figure(3.5)
    axes = figure.subplots()
    layers = len(key)
    marked = {"marker": "o"} if layers <= MARKED_LAYERS else {}
    axes.axhline(100 * residual, color=INK, linewidth=1.6, linestyle=(0, (5, 2)), label="residual stream (U_A)")
    mean = 100 * value.mean(1)
    axes.fill_between(
        range(layers), (100 * value.amin(1)).tolist(), (100 * value.amax(1)).tolist(), color=AFTER, alpha=0.18, lw=0
    )
    axes.plot(range(layers), mean.tolist(), color=AFTER, label="values (U_B), range over heads", **marked)  # type: ignore[arg-type]
    marked = {"marker": "s"} if layers <= MARKED_LAYERS else {}
    axes.plot(range(layers), (100 * key).tolist(), color=BEFORE, label="keys (U_C)", **marked)  # type: ignore[arg-type]
    axes.axhline(100 * share, color=NEUTRAL, linewidth=1.2, linestyle=":", label="an arbitrary choice of dims")
    axes.set_ylim(0, 102)
    axes.set_ylabel("second moment captured (%)")
    layer_axis(axes, layers)
    figure.legend(loc="outside upper left", ncols=2, borderaxespad=0.1, columnspacing=1.2, handlelength=1.8)
    return figure
