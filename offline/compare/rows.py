"""What a comparison consists of: one row a method, and the circumstances under which all rows were measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, PlainSerializer

BASELINE = "bf16"
# The budget that the paper's 4.5-bit recipe and every 4-bit rival fits into: weights, activations and KV cache each.
BUDGET_BITS = 4.6


def _read_infinity(value: Any) -> Any:
    return math.inf if value is None else value


def _write_infinity(value: float) -> float | None:
    return value if math.isfinite(value) else None


# JSON has no infinity: the perplexity of a model that is ruined beyond exp(700) is written as null.
Perplexity = Annotated[
    float, Field(ge=1), BeforeValidator(_read_infinity), PlainSerializer(_write_infinity, when_used="json")
]
Bits = Annotated[float, Field(gt=0, le=32, allow_inf_nan=False)]


class Row(BaseModel):
    """One method, measured.

    Attributes:
        method: its name on the command line.
        label: its name in print.
        ppl: perplexity on the comparison's data set.
        ppl_by_text: perplexity on each further text, by the text's name.
        weight_bits: bits a weight, averaged over all quantized layers, with what the method keeps in more bits
            (and scales of groups, factors of corrections) counted in.
        activation_bits: bits an input value of those layers, averaged over values.
        kv_bits: bits a cached value, averaged over layers.
        tasks: accuracy 0 … 1 by lm-eval task.
        seconds: that quantization and perplexity took.
        tokens: predicted tokens behind ``ppl``.
        settings: the method's own settings.
        note: what a reader should know, in a few words.

    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str
    label: str
    ppl: Perplexity
    weight_bits: Bits
    activation_bits: Bits
    kv_bits: Bits
    ppl_by_text: dict[str, Perplexity] = {}
    tasks: dict[str, float] = {}
    seconds: float = Field(default=0.0, ge=0)
    tokens: int = Field(default=0, ge=0)
    settings: dict[str, JsonValue] = {}
    note: str = ""

    @property
    def average_bits(self) -> float:
        """Mean of the three bit widths: the horizontal axis of the scatter plot, not a size on disk."""
        return (self.weight_bits + self.activation_bits + self.kv_bits) / 3

    def within(self, budget: float = BUDGET_BITS) -> bool:
        """Whether weights, activations and KV cache each need at most ``budget`` bits."""
        return max(self.weight_bits, self.activation_bits, self.kv_bits) <= budget


class CompareResult(BaseModel):
    """All rows of one run.

    Attributes:
        model: folder name or hub id.
        tool_version: of resq-vllm.
        date: when the run ended, ISO 8601, UTC.
        machine: facts about the machine by name (processor, cores, system, packages).
        protocol: how perplexity was measured: data set, windows, tokens a window, ….
        calibration: text, samples and tokens a sample.
        rows: one a method, in the order asked for.
        failures: reason by method, for those that have no row.
        fingerprint: hash over the rows' fingerprints: equal for runs that measured the same thing.

    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    tool_version: str
    date: str
    machine: dict[str, JsonValue]
    protocol: dict[str, JsonValue]
    calibration: dict[str, JsonValue]
    rows: tuple[Row, ...]
    failures: dict[str, str] = {}
    fingerprint: str = ""

    @property
    def baseline(self) -> Row | None:
        """The unquantized model's row, when it was asked for."""
        return next((row for row in self.rows if row.method == BASELINE), None)

    def gap(self, row: Row, text: str | None = None) -> float | None:
        """ln(ppl) − ln(ppl of bf16), on the data set or on the named text; None without both figures."""
        base = self.baseline
        if base is None:
            return None
        ours, theirs = _perplexity(row, text), _perplexity(base, text)
        return None if ours is None or theirs is None else math.log(ours) - math.log(theirs)

    def best(self, budget: float = BUDGET_BITS) -> Row | None:
        """The row of lowest perplexity within ``budget`` bits in all three; the first one of equals."""
        fitting = [row for row in self.rows if row.within(budget) and math.isfinite(row.ppl)]
        return min(fitting, key=lambda row: row.ppl, default=None)

    @property
    def texts(self) -> tuple[str, ...]:
        """Names of the further texts that any row has a figure for, in order of appearance."""
        return _names(row.ppl_by_text for row in self.rows)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks that any row has a figure for, in order of appearance."""
        return _names(row.tasks for row in self.rows)


def _perplexity(row: Row, text: str | None) -> float | None:
    return row.ppl if text is None else row.ppl_by_text.get(text)


def _names(maps: Iterable[Mapping[str, float]]) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for entries in maps:
        found |= dict.fromkeys(entries)
    return tuple(found)
