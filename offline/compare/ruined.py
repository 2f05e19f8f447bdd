"""Methods that a picture of perplexities leaves out, so that the others can be told apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol, TypeVar

# Beyond e times the lowest perplexity a model is ruined; one such point squeezes all others into a corner.
RUINED = 2.7


class Measured(Protocol):
    """Anything with a perplexity."""

    @property
    def ppl(self) -> float: ...


R = TypeVar("R", bound=Measured)


def split_ruined(rows: Sequence[R]) -> tuple[list[R], list[R]]:
    """(rows to draw, rows to name in a note), both in the order given; an infinite perplexity is never drawn."""
    lowest = min((row.ppl for row in rows), default=math.inf)
    drawn = [row for row in rows if math.isfinite(row.ppl) and row.ppl <= RUINED * lowest]
    return drawn, [row for row in rows if row not in drawn]


def note(names: Sequence[tuple[str, float]]) -> str:
    """What stands in the picture's corner: "above the picture: RTN 217.6, GPTQ 103.0"; empty without names."""
    return "above the picture: " + ", ".join(f"{name} {ppl:.1f}" for name, ppl in names) if names else ""
