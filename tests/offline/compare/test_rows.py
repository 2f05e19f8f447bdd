"""Rows and what is derived from them."""

from __future__ import annotations

import json
import math

import pytest
from pydantic import ValidationError

from offline.compare.rows import CompareResult, Row
from tests.offline.compare.fakes import comparison, row


def test_json_fields_are_the_documented_ones() -> None:
    fields = row("resq").model_dump(mode="json")
    assert {"method", "ppl", "weight_bits", "activation_bits", "kv_bits"} <= fields.keys()
    assert fields["ppl"] == 7.0


def test_round_trip_keeps_every_figure_and_an_infinite_perplexity() -> None:
    result = comparison()
    text = json.dumps(result.model_dump(mode="json"), allow_nan=False)
    again = CompareResult.model_validate_json(text)
    assert again == result
    assert again.rows[1].ppl_by_text["hi"] == math.inf
    assert row("rtn", ppl=math.inf).model_dump(mode="json")["ppl"] is None


@pytest.mark.parametrize(
    "change",
    [{"ppl": math.nan}, {"ppl": 0.5}, {"weight_bits": 0}, {"kv_bits": math.inf}, {"tokens": -1}, {"speed": 3}],
)
def test_impossible_figures_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        row("resq", **change)


def test_gap_is_the_difference_of_logarithms() -> None:
    result = comparison()
    resq = result.rows[-1]
    assert result.gap(resq) == pytest.approx(math.log(7.0 / 5.5))
    assert result.gap(resq, "de") == pytest.approx(math.log(50 / 40))
    assert result.gap(resq, "absent") is None
    assert result.gap(result.rows[0]) == 0
    assert comparison("resq").gap(resq) is None


def test_best_needs_all_three_within_the_budget() -> None:
    result = comparison()
    best = result.best()
    # LQER is better than ResQ, but its activations and cache are not within 4.6 bits.
    assert best is not None
    assert best.method == "resq"
    assert not row("resq", kv_bits=4.61).within()
    assert comparison("bf16", "lqer").best() is None


def test_a_ruined_method_is_never_the_best() -> None:
    assert comparison(rows=(row("rtn", ppl=math.inf),)).best() is None


def test_texts_and_tasks_of_all_rows_in_order_of_appearance() -> None:
    rows: tuple[Row, ...] = (row("bf16", ppl_by_text={}, tasks={"a": 0.5}), row("resq", tasks={"b": 0.25, "a": 0.5}))
    result = comparison(rows=rows)
    assert result.texts == ("de", "hi")
    assert result.tasks == ("a", "b")
