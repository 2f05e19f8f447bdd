"""Which methods a picture leaves out."""

from __future__ import annotations

import math
from types import SimpleNamespace

from offline.compare.ruined import note, split_ruined


def rows(*ppl: float) -> list[SimpleNamespace]:
    return [SimpleNamespace(ppl=value) for value in ppl]


def test_order_stays_and_only_ruined_methods_leave() -> None:
    drawn, ruined = split_ruined(rows(20, 6, 400, 5.5, math.inf, 14.8))
    assert [row.ppl for row in drawn] == [6, 5.5, 14.8]
    assert [row.ppl for row in ruined] == [20, 400, math.inf]


def test_nothing_to_draw() -> None:
    assert split_ruined([]) == ([], [])
    drawn, ruined = split_ruined(rows(math.inf))
    assert not drawn
    assert len(ruined) == 1


def test_note_names_them() -> None:
    assert note([]) == ""
    assert note([("RTN", 217.575), ("GPTQ", math.inf)]) == "above the picture: RTN 217.6, GPTQ inf"
