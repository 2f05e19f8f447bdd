"""The JSON file of a benchmark: machine, date, what else holds for all rows, and the rows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.machine import machine, today


def write_report(path: Path, rows: Sequence[Mapping[str, Any]], **facts: object) -> None:
    """{"machine", "date", **facts, "rows"} as JSON, written whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".new")
    report = {"machine": machine().to_dict(), "date": today(), **facts, "rows": list(rows)}
    temporary.write_text(json.dumps(report, indent=2) + "\n")
    temporary.rename(path)


def rounded(value: float, digits: int = 4) -> float:
    """`value` to that many significant digits: more would pretend to a precision that no run here has."""
    return float(f"{value:.{digits}g}")


def wide_console(columns: int = 110) -> Console:
    """A console for tables: at least `columns` wide where the output is no terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, columns))
