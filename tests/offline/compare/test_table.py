"""The table in its four forms."""

from __future__ import annotations

import csv
import io
import json
import math

import pytest
from rich.console import Console

from offline.compare.rows import CompareResult
from offline.compare.table import BEST_MARK, csv_text, json_text, markdown, number, print_table
from tests.offline.compare.fakes import LABELS, comparison, row


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def test_markdown_has_a_line_a_method_and_the_best_in_bold() -> None:
    lines = markdown(comparison()).splitlines()
    table = [cells(line) for line in lines if line.startswith("|")]
    assert table[0][:6] == ["method", "perplexity", "gap", "weight bits", "activation bits", "KV bits"]
    assert len(table) == 2 + len(LABELS)
    assert len({len(line) for line in table}) == 1
    resq = table[-1]
    assert resq[0] == f"**ResQ {BEST_MARK}**"
    assert resq[2] == f"**{math.log(7.0 / 5.5):+.3f}**"
    assert table[2][2] == ""  # bf16 has no gap to itself
    assert sum("**" in line for line in lines) == 1


def test_markdown_escapes_bars_in_labels() -> None:
    text = markdown(comparison(rows=(row("resq", label="a|b", note="x|y"),)))
    assert "a\\|b" in text
    assert "x\\|y" in text


def test_failures_stand_under_the_table() -> None:
    text = markdown(comparison(failures={"spinquant": "out of memory"}))
    assert "No row for spinquant: out of memory" in text


def test_csv_keeps_full_precision_and_flattens_texts_and_tasks() -> None:
    result = comparison(rows=(row("bf16"), row("resq", ppl=7.123456789, tasks={"code": 0.5})))
    first, second = csv.DictReader(io.StringIO(csv_text(result)))
    assert float(second["ppl"]) == 7.123456789
    assert float(second["gap"]) == math.log(7.123456789) - math.log(5.5)
    assert float(second["ppl:de"]) == 50
    assert first["task:code"] == ""
    assert second["task:code"] == "0.5"
    assert (first["best_in_budget"], second["best_in_budget"]) == ("0", "1")


def test_json_is_strict_and_reads_back() -> None:
    result = comparison(rows=(row("rtn", ppl=math.inf),))
    assert json.loads(json_text(result), parse_constant=lambda text: pytest.fail(text))["rows"][0]["ppl"] is None
    assert CompareResult.model_validate_json(json_text(result)) == result


@pytest.mark.parametrize("width", [60, 400])
def test_terminal_shows_every_figure_even_in_a_narrow_pipe(width: int) -> None:
    stream = io.StringIO()
    print_table(comparison(), Console(file=stream, width=width))
    text = stream.getvalue()
    for figure in ("29.000", "9.100", "+0.241", "4.90", "∞", f"ResQ {BEST_MARK}", "KV unquantized"):
        assert figure in text


def test_without_bf16_gaps_are_dashes() -> None:
    assert cells(markdown(comparison("resq")).splitlines()[4])[2].strip("*") == "–"


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (math.inf, "∞"), (2.5e7, "2.5e+07"), (7.0, "7.000"), (999_999.0, "999999.000")]
)
def test_figures_in_print(value: float | None, text: str) -> None:
    assert number(value, ".3f") == text
