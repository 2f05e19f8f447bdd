"""The table that the demo prints."""

from __future__ import annotations

import io

from rich.console import Console

from benchmarks.demo_report import DemoResults, print_report, rows

RESULTS = DemoResults(
    date="2030-01-01T00:00:00+00:00",
    machine={},
    perplexity={
        "bf16_reference": 10.0,
        "bf16_vllm": 10.0,
        "naive_rtn_reference": 40.0,
        "resq_reference": 12.0,
        "resq_vllm": 12.5,
    },
    checkpoint_bytes={"bf16": 10_000_000, "resq": 5_000_000},
    kv_cache_bytes=64 * 2**20,
    kv_cache_tokens={"bf16": 20_000, "resq": 60_000},
    tokens_per_second={"median": {"bf16": 100.0, "resq": 120.0}, "ratio": {"bf16": 1.0, "resq": 1.25}},
    texts={},
    quantize_seconds=20.0,
    seconds=100.0,
)


def test_rows_put_resq_against_bf16() -> None:
    by_name = {row[0]: row[1:] for row in rows(RESULTS)}
    assert by_name["perplexity in torch"] == ("10.000", "40.000", "12.000", "x 1.200")
    assert by_name["perplexity in vLLM"] == ("10.000", "", "12.500", "x 1.250")
    assert by_name["checkpoint, MB"] == ("10.00", "", "5.00", "x 0.500")
    assert by_name["KV tokens in 64 MiB"] == ("20,000", "", "60,000", "x 3.000")
    assert by_name["tokens/s, 8 requests"] == ("100", "", "120", "x 1.250")


def test_report_prints_every_row() -> None:
    text = io.StringIO()
    print_report(Console(file=text, width=200), RESULTS)
    assert all(cell in text.getvalue() for row in rows(RESULTS) for cell in row)
