"""Rows of benchmarks.gpu_serve."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from benchmarks.gpu_serve_report import FIGURES, rows, table


def figures(decode: float) -> dict[str, float]:
    return dict.fromkeys(FIGURES, 1.0) | {"decode_tokens_s": decode}


def answer(cells: dict[str, Any], reason: str | None = None, kv_tokens: int | None = 100) -> dict[str, Any]:
    return {"kv_tokens": kv_tokens, "cells": cells, "wanted": ["64x4096", "1x1024"], "reason": reason}


ANSWERS = {
    "bf16": answer({"64x4096": figures(1000.0), "1x1024": {"reason": "needs 1 token of KV cache"}}),
    "resq": answer({"64x4096": figures(2345.67)}, "stopped after 110 s", 320),
    "w4a16": answer({}, "ended with exit status 1: no kernel", None),
}


def test_a_row_a_cell_and_contender_with_figures_or_a_reason() -> None:
    lines = rows(ANSWERS)
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
    assert lines[4]["reason"] == "stopped after 110 s"


def test_without_bf16_there_is_no_ratio() -> None:
    (line,) = rows({"resq": answer({"64x4096": figures(5.0)}) | {"wanted": ["64x4096"]}})
    assert line["ratio_to_bf16"] is None


def test_table_shows_every_row() -> None:
    text = io.StringIO()
    Console(file=text, width=140).print(table("8b", rows(ANSWERS)))
    shown = text.getvalue()
    assert "2.35" in shown
    assert "no kernel" in shown
    assert shown.count("resq") == 2
