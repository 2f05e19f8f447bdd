"""Timing of kernels: contenders take turns, every turn on weights or pages that the caches no longer hold.

A contender has several copies of its operand and uses them in rotation. All contenders of a case have equally many, so
between two uses of one copy the whole pool of all contenders passes through the caches.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.pairs import Comparison, interleave

# A turn much shorter than this measures the clock and the waking of sleeping threads.
TURN_SECONDS = 3e-3
FEWEST_ROUNDS = 5

Call = Callable[[], object]


def copies_in_pool(budget: int, bytes_per_copy: int, most: int = 4096) -> int:
    """How many copies of all contenders' operands together fit `budget` bytes; at least 2, at most `most`."""
    return max(2, min(most, budget // max(1, bytes_per_copy)))


@dataclass
class Turn:
    """One contender: its calls, one a copy of its operand, and how many of them make a turn."""

    calls: Sequence[Call]
    length: int = 1
    _next: int = 0

    def _run(self, count: int) -> float:
        chosen = [self.calls[(self._next + index) % len(self.calls)] for index in range(count)]
        self._next = (self._next + count) % len(self.calls)
        started = time.perf_counter()
        for call in chosen:
            call()
        return (time.perf_counter() - started) / count

    def warm_up(self) -> None:
        """Run every call once (libraries compile and allocate at the first), then choose the length of a turn."""
        seconds = min(self._run(1) for _ in self.calls)
        self.length = max(1, min(len(self.calls), round(TURN_SECONDS / seconds)))

    def __call__(self) -> float:
        """Calls per second over one turn."""
        return 1 / self._run(self.length)


def rounds_within(seconds: float, turns: Mapping[str, Turn], most: int) -> int:
    """Rounds that fit `seconds`, between FEWEST_ROUNDS and `most`, from a trial round."""
    started = time.perf_counter()
    for turn in turns.values():
        turn()
    one = time.perf_counter() - started
    return max(min(FEWEST_ROUNDS, most), min(most, int(seconds / one)))


def measure(
    contenders: Mapping[str, Sequence[Call]], rounds: int, seconds: float, baselines: Sequence[str]
) -> Comparison:
    """Rates (calls per second) of all contenders over the same rounds, beside the fastest of `baselines`.

    Args:
        contenders: by name, the calls of each, one a copy of its operand.
        rounds: at most so many.
        seconds: after about so long there are no more rounds (FEWEST_ROUNDS at least).
        baselines: names; the one with the best median becomes the baseline of the ratios.

    Raises:
        ValueError: when none of `baselines` is among the contenders.
    """
    present = [name for name in baselines if name in contenders]
    if not present:
        raise ValueError(f"none of the baselines {', '.join(baselines)} is among the contenders.")
    turns = {name: Turn(calls) for name, calls in contenders.items()}
    for turn in turns.values():
        turn.warm_up()
    measured = interleave(turns, rounds_within(seconds, turns, rounds), present[0])
    return Comparison(max(present, key=measured.median), measured.rounds)


def median_ms(measured: Comparison, name: str) -> float:
    """Median milliseconds of one call."""
    return statistics.median(1e3 / rate for rate in measured.rounds[name])


def best_rate(call: Call, seconds: float) -> float:
    """Calls per second of the fastest among the calls that fit `seconds` (3 at least): a ceiling, nothing typical."""
    call()
    fastest = float("inf")
    ends = time.perf_counter() + seconds
    for done in itertools.count():
        started = time.perf_counter()
        if done >= 3 and started > ends:
            return 1 / fastest
        call()
        fastest = min(fastest, time.perf_counter() - started)
    raise AssertionError("unreachable")
