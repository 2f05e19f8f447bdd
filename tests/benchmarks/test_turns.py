"""Turns of kernels: rotation through the pool, rounds within a time, the faster of two baselines."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from benchmarks import turns
from benchmarks.pairs import Comparison
from benchmarks.turns import Turn, best_rate, copies_in_pool, measure, median_ms, rounds_within


def sleeper(seconds: float) -> Callable[[], object]:
    return lambda: time.sleep(seconds)


@pytest.mark.parametrize(("budget", "size", "copies"), [(100, 10, 10), (100, 99, 2), (10**9, 1, 4096), (5, 0, 5)])
def test_copies_fit_the_pool_but_are_never_one(budget: int, size: int, copies: int) -> None:
    assert copies_in_pool(budget, size) == copies


def test_turn_goes_round_all_copies_and_goes_on_where_it_stopped() -> None:
    used: list[int] = []

    def call(index: int) -> Callable[[], object]:
        return lambda: used.append(index)

    turn = Turn([call(index) for index in range(3)], length=2)
    for _ in range(3):
        assert turn() > 0
    assert used == [0, 1, 2, 0, 1, 2]


def test_warm_up_runs_every_copy_and_makes_turns_of_slow_calls_short() -> None:
    used: list[str] = []

    def slow() -> None:
        used.append("slow")
        time.sleep(2 * turns.TURN_SECONDS)

    turn = Turn([slow, slow])
    turn.warm_up()
    assert used == ["slow", "slow"]
    assert turn.length == 1


def test_warm_up_makes_turns_of_fast_calls_as_long_as_the_pool_allows() -> None:
    turn = Turn([lambda: None] * 7)
    turn.warm_up()
    assert turn.length == 7


def test_rounds_are_five_at_least_and_no_more_than_asked_for() -> None:
    slow = {"a": Turn([sleeper(0.01)])}
    assert rounds_within(0.0, slow, 25) == 5
    assert rounds_within(0.0, slow, 3) == 3
    assert rounds_within(60.0, slow, 25) == 25


def test_ratios_are_against_the_faster_baseline() -> None:
    contenders = {"resq": [sleeper(0.001)], "bf16": [sleeper(0.02)], "bf16-vllm": [sleeper(0.005)]}
    measured = measure(contenders, 3, 0.0, ("bf16", "bf16-vllm", "absent"))
    assert measured.baseline == "bf16-vllm"
    assert measured.ratio("bf16-vllm") == 1.0
    assert measured.ratio("bf16") < 1 < measured.ratio("resq")


def test_without_a_baseline_nothing_is_measured() -> None:
    with pytest.raises(ValueError, match="none of the baselines bf16 is among the contenders"):
        measure({"resq": [lambda: None]}, 1, 0.0, ("bf16",))


def test_median_of_times_in_milliseconds() -> None:
    assert median_ms(Comparison("a", {"a": [1000.0, 500.0, 10.0]}), "a") == pytest.approx(2.0)


def test_best_rate_is_that_of_the_fastest_call() -> None:
    pauses = iter([0.0, 0.02, 0.001, 0.02, 0.02])
    assert 100 < best_rate(lambda: time.sleep(next(pauses)), 0.0) <= 1000
