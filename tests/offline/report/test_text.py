"""Numbers in print."""

from __future__ import annotations

import math

import pytest

from offline.report.text import byte_size, change, geometric_mean, percent, perplexity


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1008, "1,008 B"),
        (9999, "9,999 B"),
        (442_368, "432 KiB"),
        (2 << 20, "2.00 MiB"),
        (1 << 40, "1024 GiB"),
    ],
)
def test_byte_size(count: int, text: str) -> None:
    assert byte_size(count).replace("\u00a0", " ") == text


def test_ratios() -> None:
    assert percent(0.00613).replace("\u00a0", " ") == "0.613 %"
    assert change(18.0, 18.45).replace("\u00a0", " ") == "+2.5 %"
    assert change(18.0, math.inf) == "–"
    assert (perplexity(18.4), perplexity(12345.6), perplexity(math.inf)) == ("18.40", "12,346", "∞")


def test_geometric_mean_leaves_out_what_is_absent() -> None:
    assert geometric_mean([0.01, None, 1.0, 0.0]) == pytest.approx(0.1)
    assert geometric_mean([None]) is None
