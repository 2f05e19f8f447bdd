"""Numbers as the report prints them."""

from __future__ import annotations

import math
from collections.abc import Iterable

EXACT_BYTES = 10_000
SPACE = "\u00a0"  # no line may end between a number and its unit


def byte_size(count: int) -> str:
    """Exact below 10,000; beyond that three digits and a binary unit: 2 << 20 -> "2.00 MiB"."""
    if count < EXACT_BYTES:
        return f"{count:,}{SPACE}B"
    value = float(count)
    for unit in ("KiB", "MiB", "GiB"):
        value /= 1024
        if value < 1000:
            return f"{value:#.3g}".rstrip(".") + f"{SPACE}{unit}"
    return f"{value:.0f}{SPACE}GiB"


def percent(ratio: float) -> str:
    """Three digits: 0.00613 -> "0.613 %"."""
    return f"{100 * ratio:#.3g}{SPACE}%"


def perplexity(value: float) -> str:
    """Two decimals below 1000; "∞" where it overflows."""
    if math.isinf(value):
        return "∞"
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}"


def change(before: float, after: float) -> str:
    """+2.4 %, or "–" where there is no meaning in it."""
    if not (math.isfinite(before) and math.isfinite(after)):
        return "–"
    return f"{100 * (after / before - 1):+.1f}{SPACE}%"


def geometric_mean(values: Iterable[float | None]) -> float | None:
    """Of the positive values; None without any."""
    logs = [math.log(value) for value in values if value]
    return math.exp(math.fsum(logs) / len(logs)) if logs else None
