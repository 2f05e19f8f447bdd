"""Interleaved rounds and the median of paired ratios."""

from __future__ import annotations

import pytest

from benchmarks.pairs import Comparison, interleave


def test_ratio_pairs_the_rounds_before_it_takes_the_median() -> None:
    # The machine slows down fourfold: medians alone would say 1.0, round by round it is 2.
    measured = Comparison("bf16", {"bf16": [400.0, 200.0, 100.0], "resq": [800.0, 400.0, 200.0]})
    assert measured.ratio("resq") == 2.0
    assert measured.median("resq") == 400.0
    assert measured.ratio("bf16") == 1.0


def test_one_bad_round_does_not_move_the_ratio() -> None:
    measured = Comparison("bf16", {"bf16": [100.0] * 5, "resq": [150.0, 150.0, 1.0, 150.0, 150.0]})
    assert measured.ratio("resq") == 1.5


def test_quartiles_say_how_far_the_rounds_lie_apart() -> None:
    measured = Comparison("a", {"a": [1.0, 5.0, 3.0, 2.0, 4.0], "b": [7.0]})
    assert measured.quartiles("a") == (2.0, 4.0)
    assert measured.quartiles("b") == (7.0, 7.0)


def test_contenders_take_turns_and_swap_who_goes_first() -> None:
    order: list[str] = []

    def contender(name: str, rate: float) -> float:
        order.append(name)
        return rate

    contenders = {"a": lambda: contender("a", 1.0), "b": lambda: contender("b", 3.0)}
    measured = interleave(contenders, 3, baseline="a")
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert measured.to_dict() == {
        "baseline": "a",
        "rounds": {"a": [1.0, 1.0, 1.0], "b": [3.0, 3.0, 3.0]},
        "median": {"a": 1.0, "b": 3.0},
        "ratio": {"a": 1.0, "b": 3.0},
    }


def test_no_round_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one round"):
        interleave({"a": lambda: 1.0}, 0, baseline="a")


def test_unknown_baseline_is_refused() -> None:
    with pytest.raises(ValueError, match="'b' is none of a"):
        interleave({"a": lambda: 1.0}, 1, baseline="b")
