"""What an engine is asked to do: prompts of so many tokens, answers of so many, one or several at once."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

STREAMS = (1, 16)


@dataclass(frozen=True)
class Scenario:
    """Requests of `prompt` input and `output` generated tokens; at one stream `repeats` of them, one after another."""

    name: str
    prompt: int
    output: int
    repeats: int = 1


SCENARIOS = (
    Scenario("decode", 32, 128),
    Scenario("prefill", 1024, 8, repeats=3),
    Scenario("mixed", 256, 64, repeats=2),
    Scenario("long", 4096, 64),
)


@dataclass(frozen=True)
class Cell:
    """A scenario with `streams` requests in flight at a time."""

    scenario: Scenario
    streams: int

    @property
    def key(self) -> str:
        return f"{self.scenario.name}/{self.streams}"

    @property
    def requests(self) -> int:
        """Requests in all: one lot at several streams, `repeats` in turn at one."""
        return self.streams if self.streams > 1 else self.scenario.repeats

    @property
    def tokens(self) -> int:
        """Tokens of all requests, prompts included: what `vllm bench throughput` counts."""
        return self.requests * (self.scenario.prompt + self.scenario.output)

    def to_dict(self) -> dict[str, Any]:
        """JSON form, for a child process."""
        return {"scenario": asdict(self.scenario), "streams": self.streams}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Cell:
        """Inverse of to_dict."""
        return cls(Scenario(**data["scenario"]), data["streams"])


@dataclass(frozen=True)
class Measured:
    """One pass over a cell: wall-clock seconds; of every request, those to its first token and between tokens."""

    seconds: float
    first: tuple[float, ...]
    between: tuple[float, ...]

    def to_dict(self, cell: Cell) -> dict[str, float]:
        """tokens_s over all tokens, output_tokens_s over the generated; medians over the requests in milliseconds."""
        return {
            "tokens_s": cell.tokens / self.seconds,
            "output_tokens_s": cell.requests * cell.scenario.output / self.seconds,
            "ttft_ms": 1e3 * statistics.median(self.first),
            "tpot_ms": 1e3 * statistics.median(self.between),
        }


def longest(cells: Sequence[Cell]) -> int:
    """Tokens of the longest request."""
    return max(cell.scenario.prompt + cell.scenario.output for cell in cells)


def most_at_once(cells: Sequence[Cell]) -> int:
    """Tokens that are in a KV cache at once at most."""
    return max(cell.streams * (cell.scenario.prompt + cell.scenario.output) for cell in cells)
