"""Rows of benchmarks.gpu_serve."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from benchmarks.gpu_serve_report import FIGURES, HOT_FIGURES, rows, table

WANTED = ("64x4096", "1x1024")


def figures(decode: float) -> dict[str, Any]:
    ranges = {f"{name}_range": [0.5, 1.23456] for name in HOT_FIGURES}
    return dict.fromkeys(FIGURES, 1.0) | ranges | {"decode_tokens_s": decode, "commit": "abc"}


def answer(cells: dict[str, Any], kv_tokens: int | None = 100) -> dict[str, Any]:
    return {"kv_tokens": kv_tokens, "cells": cells}


FAILED = {"reason": "ended with exit status 1: no kernel", "commit": "abc"}
ANSWERS = {
    "bf16": answer({"64x4096": figures(1000.0), "1x1024": {"reason": "needs 1 token of KV cache"}}),
    "resq": answer({"64x4096": figures(2345.67)}, 320),
    "w4a16": answer(dict.fromkeys(WANTED, FAILED), None),
}


def test_a_row_a_cell_and_contender_with_figures_or_a_reason() -> None:
    lines = rows(ANSWERS, WANTED)
    assert [(line["contender"], line["streams"], line["context"]) for line in lines] == [
        ("bf16", 64, 4096),
        ("resq", 64, 4096),
        ("w4a16", 64, 4096),
        ("bf16", 1, 1024),
        ("resq", 1, 1024),
        ("w4a16", 1, 1024),
    ]
    assert lines[0]["ratio_to_bf16"] == 1.0
    assert lines[1]["ratio_to_bf16"] == 2.346
    assert lines[1]["kv_tokens"] == 320
    assert lines[2]["reason"] == "ended with exit status 1: no kernel"
    assert lines[3]["reason"] == "needs 1 token of KV cache"
    # Measured what it could before its time was up.
    assert lines[4]["reason"] == "not measured yet"
    assert lines[1]["decode_tokens_s_range"] == [0.5, 1.235]
    assert lines[1]["commit"] == "abc"


def test_without_bf16_there_is_no_ratio() -> None:
    (line,) = rows({"resq": answer({"64x4096": figures(5.0)})}, WANTED[:1])
    assert line["ratio_to_bf16"] is None


def test_table_shows_every_row() -> None:
    text = io.StringIO()
    Console(file=text, width=160).print(table("8b", rows(ANSWERS, WANTED)))
    shown = text.getvalue()
    assert "2.35" in shown
    assert "no kernel" in shown
    assert shown.count("resq") == 2
