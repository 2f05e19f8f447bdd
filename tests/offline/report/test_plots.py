"""Figures: the numbers that are drawn, and PNGs that are the same for the same numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from offline.report.comparison import Row
from offline.report.plots.comparison import perplexity_scatter, spread
from offline.report.plots.errors import ROUNDING, error_panels
from offline.report.plots.sizes import byte_bars
from offline.report.plots.spectra import layer_spectra, spectrum
from offline.report.plots.style import png


def row(method: str, ppl: float, bits: float) -> Row:
    return Row(method=method, ppl=ppl, weight_bits=bits, activation_bits=bits, kv_bits=bits)


def test_labels_are_spread_as_little_as_need_be() -> None:
    assert spread([0.0, 100.0], 10) == [0.0, 100.0]
    assert spread([0.0, 0.0, 0.0], 10) == [-10.0, 0.0, 10.0]
    assert spread([0.0, 4.0, 50.0], 10) == [-3.0, 7.0, 50.0]
    assert spread([], 10) == []


def test_scatter_shows_every_method_by_name() -> None:
    rows = [row("bf16", 5.6, 16), row("resq", 7.0, 4.5), row("quarot", 9.1, 4.0), row("spinquant", 9.1, 4.0)]
    figure = perplexity_scatter(rows)
    assert sorted(text.get_text() for text in figure.axes[0].texts) == sorted(r.method for r in rows)
    assert not figure.axes[0].get_title(loc="left")


def test_scatter_names_ruined_methods_instead_of_drawing_them() -> None:
    axes = perplexity_scatter([row("resq", 7.0, 4.5), row("rtn", 400, 4), row("bf16", 5.6, 16)]).axes[0]
    assert sorted(text.get_text() for text in axes.texts) == ["bf16", "resq"]
    assert axes.get_title(loc="left") == "above the picture: rtn 400.0"
    assert axes.get_ylim()[1] < 8


def test_a_single_method_is_a_plot_too() -> None:
    assert len(perplexity_scatter([row("resq", 7.0, 4.5)]).axes[0].texts) == 1


def test_spectrum_shades_the_high_part() -> None:
    axes = spectrum(torch.arange(1.0, 65, dtype=torch.float64), 8).axes[0]
    assert axes.texts[0].get_text() == "8 kept\nat 8 bits"
    assert axes.get_yscale() == "log"
    assert not spectrum(torch.arange(1.0, 65), 0).axes[0].texts


def test_zero_eigenvalues_are_left_out_of_a_log_axis() -> None:
    variance = torch.tensor([[0.0, 1e-20, 1.0, 2.0]], dtype=torch.float64)
    drawn = np.asarray(layer_spectra(variance, 2).axes[0].lines[0].get_ydata(), dtype=float)
    assert np.isnan(drawn).tolist() == [True, True, False, False]


def test_error_panels_draw_percent_and_gaps() -> None:
    figure = error_panels({"keys": [[0.01, None], [0.005, 0.002]]}, ROUNDING)
    before, after = (np.asarray(line.get_ydata(), dtype=float) for line in figure.axes[0].lines)
    assert after.tolist() == [0.5, 0.2]
    assert np.isnan(before).tolist() == [False, True]


@pytest.mark.parametrize("largest", [1, 999, 3072, 50_000, 3 << 30])
def test_byte_axis_has_few_labels(largest: int) -> None:
    axes = byte_bars([("part", largest), ("other", 1)]).axes[0]
    assert 2 <= len([tick for tick in axes.get_xticks() if 0 <= tick <= largest]) <= 5


def test_png_is_reproducible_and_names_no_site() -> None:
    first, second = (png(byte_bars([("a", 10), ("b", 2)])) for _ in range(2))
    assert first == second
    assert first.startswith(b"\x89PNG")
    assert b"http" not in first
