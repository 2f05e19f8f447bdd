"""Paired comparison on a machine whose speed drifts: contenders take turns, and the ratio is taken round by round."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Comparison:
    """Measurements of several contenders over the same rounds (higher is better), one of them the baseline."""

    baseline: str
    rounds: dict[str, list[float]]

    def median(self, name: str) -> float:
        """Median over the rounds of a contender."""
        return statistics.median(self.rounds[name])

    def ratio(self, name: str) -> float:
        """Median over the rounds of contender / baseline within a round."""
        pairs = zip(self.rounds[name], self.rounds[self.baseline], strict=True)
        return statistics.median(value / base for value, base in pairs)

    def quartiles(self, name: str) -> tuple[float, float]:
        """First and third quartile over the rounds of a contender: how far its rounds lie apart."""
        values = self.rounds[name]
        if len(values) == 1:
            return values[0], values[0]
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        return low, high

    def to_dict(self) -> dict[str, object]:
        """JSON form: every round, the medians and the paired ratios."""
        return {
            "baseline": self.baseline,
            "rounds": self.rounds,
            "median": {name: self.median(name) for name in self.rounds},
            "ratio": {name: self.ratio(name) for name in self.rounds},
        }


def turns(names: Sequence[str], rounds: int) -> Iterator[str]:
    """Whose turn it is: all names a round, every second round in reverse order, so that none always goes first."""
    for index in range(rounds):
        yield from names if index % 2 == 0 else reversed(names)


def interleave(contenders: Mapping[str, Callable[[], float]], rounds: int, baseline: str) -> Comparison:
    """Measure every contender once a round, in the order of `turns`.

    Raises:
        ValueError: when there is no round, or the baseline is not among the contenders.
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}: at least one round is needed.")
    if baseline not in contenders:
        raise ValueError(f"the baseline {baseline!r} is none of {', '.join(contenders)}.")
    measured: dict[str, list[float]] = {name: [] for name in contenders}
    for name in turns(list(contenders), rounds):
        measured[name].append(contenders[name]())
    return Comparison(baseline, measured)
