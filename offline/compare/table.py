"""The comparison as a table: in the terminal, Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from offline.compare.rows import BUDGET_BITS, CompareResult, Row

BEST_MARK = "★"


@dataclass(frozen=True)
class Column:
    """A heading and the cell below it for a row."""

    heading: str
    cell: Callable[[Row], str]


def columns(result: CompareResult) -> list[Column]:
    """What a reader sees of ``result``: method, perplexity and gap, bits, then a column a text, a task, and time."""
    best = result.best()

    def gap(row: Row) -> str:
        return number(result.gap(row), "+.3f") if row is not result.baseline else ""

    found = [
        Column("method", lambda row: f"{row.label} {BEST_MARK}" if row is best else row.label),
        Column("perplexity", lambda row: number(row.ppl, ".3f")),
        Column("gap", gap),
        Column("weight bits", lambda row: number(row.weight_bits, ".2f")),
        Column("activation bits", lambda row: number(row.activation_bits, ".2f")),
        Column("KV bits", lambda row: number(row.kv_bits, ".2f")),
    ]
    found += [_text_column(text) for text in result.texts]
    found += [_task_column(task) for task in result.tasks]
    found.append(Column("seconds", lambda row: number(row.seconds, ".0f")))
    if any(row.note for row in result.rows):
        found.append(Column("note", lambda row: row.note))
    return found


def _text_column(text: str) -> Column:
    return Column(f"ppl {text}", lambda row: number(row.ppl_by_text.get(text), ".3f"))


def _task_column(task: str) -> Column:
    return Column(task, lambda row: number(row.tasks.get(task), ".1%"))


def number(value: float | None, form: str) -> str:
    """A figure in print: "–" where there is none; a perplexity beyond a million in powers of ten, or "∞"."""
    if value is None:
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    return format(value, ".1e") if abs(value) >= 1e6 else format(value, form)


def caption(result: CompareResult) -> list[str]:
    """The sentences under a table: what was measured and what the columns mean."""
    lines = [_facts("Measured", result.protocol), _facts("Calibrated", result.calibration)]
    lines.append("gap = ln(perplexity) − ln(perplexity of bf16).")
    if result.best() is not None:
        lines.append(
            f"{BEST_MARK} lowest perplexity with at most {BUDGET_BITS} bits each for weights, activations and KV cache."
        )
    lines += [f"No row for {method}: {reason}" for method, reason in result.failures.items()]
    lines.append(f"resq-vllm {result.tool_version}, {result.date}, {result.machine.get('processor', '')}.")
    return [line for line in lines if line]


def _facts(verb: str, facts: dict) -> str:
    return f"{verb}: " + ", ".join(f"{name} {value}" for name, value in facts.items()) + "." if facts else ""


def terminal_table(result: CompareResult) -> Table:
    """A rich table; the best row in bold."""
    table = Table(title=f"{result.model}", caption="\n".join(caption(result)), caption_justify="left")
    shown = columns(result)
    for index, column in enumerate(shown):
        words = index == 0 or column.heading == "note"
        # Headings and notes may wrap in a narrow terminal, figures must not.
        narrowest = None if words else max((len(column.cell(row)) for row in result.rows), default=0)
        table.add_column(column.heading, justify="left" if words else "right", min_width=narrowest)
    for row in result.rows:
        table.add_row(*(column.cell(row) for column in shown), style="bold" if row is result.best() else None)
    return table


def print_table(result: CompareResult, console: Console | None = None) -> None:
    """Print the table to ``console``, or to the terminal; a pipe gets as many columns as the table needs."""
    console = console or Console()
    table = terminal_table(result)
    if not console.is_terminal:
        unlimited = console.options.update(max_width=100_000)
        console.width = max(console.width, console.measure(table, options=unlimited).maximum)
    console.print(table)


def markdown(result: CompareResult) -> str:
    """A Markdown table with its caption; the best row in bold."""
    shown = columns(result)
    lines = [f"# {result.model}", "", _markdown_line([column.heading for column in shown])]
    rules = [":---" if index == 0 or column.heading == "note" else "---:" for index, column in enumerate(shown)]
    lines.append(_markdown_line(rules))
    best = result.best()
    for row in result.rows:
        cells = [column.cell(row).replace("|", "\\|") for column in shown]
        lines.append(_markdown_line([f"**{cell}**" if cell and row is best else cell for cell in cells]))
    return "\n".join([*lines, "", *(f"{line}  " for line in caption(result))]) + "\n"


def _markdown_line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def csv_text(result: CompareResult) -> str:
    """One line a row at full precision: the JSON fields; texts and tasks are columns ``ppl:NAME`` and ``task:NAME``."""
    heading = ["method", "label", "ppl", "gap", "weight_bits", "activation_bits", "kv_bits"]
    heading += [f"ppl:{text}" for text in result.texts] + [f"task:{task}" for task in result.tasks]
    heading += ["seconds", "tokens", "best_in_budget", "note"]
    best = result.best()
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(heading)
    for row in result.rows:
        gap = result.gap(row)
        figures: list[object] = [row.method, row.label, row.ppl, "" if gap is None else gap]
        figures += [row.weight_bits, row.activation_bits, row.kv_bits]
        figures += [row.ppl_by_text.get(text, "") for text in result.texts]
        figures += [row.tasks.get(task, "") for task in result.tasks]
        writer.writerow([*figures, row.seconds, row.tokens, int(row is best), row.note])
    return buffer.getvalue()


def json_text(result: CompareResult) -> str:
    """The whole result; an infinite perplexity is null."""
    return json.dumps(result.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"
