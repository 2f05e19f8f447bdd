"""Pictures: which ones are drawn, and what stands in them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Annotation

from offline.compare.plots import KINDS, bits_figure, gaps_figure, kind, texts_figure, write_plots
from offline.compare.rows import CompareResult
from tests.offline.compare.fakes import comparison, row


def words(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def drawn(figure: Figure | None) -> Figure:
    assert figure is not None
    return figure


def test_every_finite_method_is_a_named_point() -> None:
    rows = (*comparison().rows[:1], row("rtn", ppl=math.inf), row("resq"))
    figure = drawn(bits_figure(comparison(rows=rows)))
    assert sorted(words(figure)) == ["ResQ", "above the picture: RTN inf", "bf16"]
    points = [tuple(np.asarray(collection.get_offsets())[0]) for collection in figure.axes[0].collections]
    assert points == [(16, 5.5), (pytest.approx((4.5 + 4.6 + 4.5) / 3), 7.0)]


def test_names_do_not_cover_each_other_when_methods_crowd() -> None:
    rows = [row("resq", label=f"a method {i}", ppl=7 + 0.02 * i, kv_bits=4.5) for i in range(12)]
    figure = drawn(bits_figure(comparison(rows=tuple(rows))))
    boxes = [text.get_window_extent() for text in figure.axes[0].texts if isinstance(text, Annotation)]
    assert len(boxes) == 12
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_bars_carry_the_gaps_and_cut_ruined_ones() -> None:
    rows = (*comparison("bf16", "resq").rows, row("rtn", ppl=math.inf), row("quarot", ppl=5.5 * math.e**4))
    figure = drawn(gaps_figure(comparison(rows=rows)))
    assert words(figure) == [f"{math.log(7 / 5.5):.3f}", "→ ∞", "→ 4.0"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["ResQ", "RTN", "QuaRot"]


def test_one_panel_a_text() -> None:
    figure = drawn(texts_figure(comparison()))
    assert [axes.get_title() for axes in figure.axes] == ["de", "hi"]
    assert words(figure)[0] == f"{math.log(400 / 40):.3f}"


def test_a_method_may_beat_bf16() -> None:
    figure = drawn(gaps_figure(comparison(rows=(row("bf16"), row("resq", ppl=5.0)))))
    assert words(figure) == [f"{math.log(5 / 5.5):.3f}"]
    assert figure.axes[0].get_xlim()[0] < 0


@pytest.mark.parametrize(
    ("result", "names"),
    [
        (comparison(), {"bits", "gaps", "texts"}),
        (comparison("resq"), {"bits"}),
        (comparison("bf16"), {"bits"}),
        (comparison(rows=(row("bf16", ppl_by_text={}), row("resq", ppl_by_text={}))), {"bits", "gaps"}),
        (comparison(rows=(row("rtn", ppl=math.inf),)), set()),
        (comparison(rows=()), set()),
    ],
)
def test_only_plots_with_something_in_them(result: CompareResult, names: set[str], tmp_path: Path) -> None:
    written = write_plots(result, tmp_path)
    assert {path.name for path in written} == {f"compare-{name}.png" for name in names}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)
    assert set(tmp_path.iterdir()) == set(written)


def test_kinds_differ_in_more_than_colour() -> None:
    result = comparison()
    assert [kind(entry, result) for entry in result.rows] == ["baseline", "within", "within", "beyond", "best"]
    assert len({marker for _, marker, _, _ in KINDS.values()}) == len(KINDS)
