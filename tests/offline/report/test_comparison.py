"""The file of ``resq compare`` as the report reads it."""

from __future__ import annotations

import math
from pathlib import Path

from offline.compare.rows import CompareResult
from offline.compare.rows import Row as WrittenRow
from offline.report.comparison import read_comparison


def test_reads_what_resq_compare_writes(tmp_path: Path) -> None:
    rows = tuple(
        WrittenRow(method=method, label=label, ppl=ppl, weight_bits=4.5, activation_bits=4.75, kv_bits=4.625)
        for method, label, ppl in (("resq", "ResQ", 7.1), ("rtn", "RTN", math.inf))
    )
    written = CompareResult(
        model="stories", tool_version="0", date="2026-01-01", machine={}, protocol={}, calibration={}, rows=rows
    )
    (tmp_path / "compare.json").write_text(written.model_dump_json())
    found = read_comparison(tmp_path / "compare.json")
    assert found.model == "stories"
    assert [(row.name, row.ppl) for row in found.rows] == [("ResQ", 7.1), ("RTN", math.inf)]
    assert found.rows[0].average_bits == written.rows[0].average_bits
