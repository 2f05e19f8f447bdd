"""What a comparison asks of the code that quantizes and measures: the seam between methods and tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from pydantic import JsonValue


@dataclass(frozen=True)
class MethodResult:
    """A measured method: the figures of :class:`offline.compare.rows.Row`.

    ``model`` and ``tokenizer``, a transformers-like causal language model in fake quantization and its tokenizer, are
    needed when tasks are to be run on it; they are dropped afterwards. ``seconds`` None: as long as ``run`` took.
    """

    ppl: float
    weight_bits: float
    activation_bits: float
    kv_bits: float
    ppl_by_text: Mapping[str, float] = field(default_factory=dict)
    seconds: float | None = None
    tokens: int = 0
    settings: Mapping[str, JsonValue] = field(default_factory=dict)
    note: str = ""
    model: Any = None
    tokenizer: Any = None


class Engine(Protocol):
    """A model with its calibration and evaluation tokens, ready to be quantized by any of its methods."""

    def methods(self) -> Mapping[str, str]:
        """Label by method name, in the order of the table. Cheap: called before any work."""
        ...

    def protocol(self) -> Mapping[str, JsonValue]:
        """How perplexity is measured, for the reader: data set, windows, tokens a window, …."""
        ...

    def calibration(self) -> Mapping[str, JsonValue]:
        """What the methods are calibrated on, for the reader: text, samples, tokens a sample, …."""
        ...

    def fingerprint(self, method: str) -> str:
        """:func:`offline.compare.cache.fingerprint` of everything that decides the method's figures."""
        ...

    def run(self, method: str, with_model: bool) -> MethodResult:
        """Quantize and measure; ``with_model``: also hand out model and tokenizer, for tasks."""
        ...
