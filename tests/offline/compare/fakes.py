"""An engine in memory, and tasks that need no model: the orchestration is what is tested with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import JsonValue

from offline.compare.engine import MethodResult
from offline.compare.rows import CompareResult, Row

LABELS = {"bf16": "bf16", "rtn": "RTN", "quarot": "QuaRot", "lqer": "LQER", "resq": "ResQ"}
RESULTS = {
    "bf16": MethodResult(5.5, 16, 16, 16, {"de": 40.0, "hi": 9.0}, tokens=1000),
    "rtn": MethodResult(29.0, 4, 4, 4, {"de": 400.0, "hi": float("inf")}, tokens=1000),
    "quarot": MethodResult(9.1, 4, 4, 4, {"de": 60.0, "hi": 11.0}, tokens=1000, settings={"groups": 8}),
    "lqer": MethodResult(6.4, 4.9, 8, 16, {"de": 44.0, "hi": 9.5}, tokens=1000, note="KV unquantized"),
    "resq": MethodResult(7.0, 4.5, 4.6, 4.5, {"de": 50.0, "hi": 10.0}, tokens=1000),
}


class FakeEngine:
    """Answers with RESULTS, counts its runs, and fails where it is told to."""

    def __init__(self, failing: Mapping[str, Exception] | None = None, version: str = "1") -> None:
        self.failing = dict(failing or {})
        self.version = version
        self.runs: list[tuple[str, bool]] = []

    def methods(self) -> Mapping[str, str]:
        return LABELS

    def protocol(self) -> Mapping[str, JsonValue]:
        return {"data set": "a text", "windows": 4}

    def calibration(self) -> Mapping[str, JsonValue]:
        return {"text": "another", "samples": 8}

    def fingerprint(self, method: str) -> str:
        return f"{method}{self.version}".ljust(64, "0")

    def run(self, method: str, with_model: bool) -> MethodResult:
        self.runs.append((method, with_model))
        if method in self.failing:
            raise self.failing[method]
        return RESULTS[method]


class FakeTasks:
    """Gives every model the same accuracy."""

    def __init__(self, digest: str = "t") -> None:
        self.text = digest
        self.runs = 0

    def digest(self) -> str:
        return self.text

    def run(self, model: Any, tokenizer: Any) -> dict[str, float]:
        self.runs += 1
        return {"code": 0.75}


def row(method: str, **changes: Any) -> Row:
    result = RESULTS[method]
    values: dict[str, Any] = {
        "method": method,
        "label": LABELS[method],
        "ppl": result.ppl,
        "ppl_by_text": dict(result.ppl_by_text),
        "weight_bits": result.weight_bits,
        "activation_bits": result.activation_bits,
        "kv_bits": result.kv_bits,
        "note": result.note,
    }
    return Row.model_validate(values | changes)


def comparison(*methods: str, **changes: Any) -> CompareResult:
    values: dict[str, Any] = {
        "model": "stories",
        "tool_version": "1.0",
        "date": "2031-02-03T04:05:06+00:00",
        "machine": {"processor": "a processor"},
        "protocol": {"data set": "a text"},
        "calibration": {"samples": 8},
        "rows": tuple(row(method) for method in methods or LABELS),
    }
    return CompareResult.model_validate(values | changes)
