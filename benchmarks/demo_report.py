"""The figures of the demo and the table that shows them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class DemoResults:
    """Everything that demo/results.json holds; "bf16" and "resq" name the two served models.

    perplexity: by "<model>_<engine>", on the bundled held-out text; checkpoint_bytes: safetensors files;
    kv_cache_tokens: what vLLM reports for `kv_cache_bytes` of cache; tokens_per_second: rounds, medians, paired ratios.
    """

    date: str
    machine: dict[str, Any]
    perplexity: dict[str, float]
    checkpoint_bytes: dict[str, int]
    kv_cache_bytes: int
    kv_cache_tokens: dict[str, int]
    tokens_per_second: dict[str, Any]
    texts: dict[str, str]
    quantize_seconds: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


def megabytes(count: int) -> str:
    """Bytes as MB with two decimals."""
    return f"{count / 1e6:.2f} MB"


def rows(results: DemoResults) -> list[tuple[str, str, str, str]]:
    """Lines of the table: quantity, bf16, ResQ, and how ResQ compares."""
    ppl, rate = results.perplexity, results.tokens_per_second
    size, tokens = results.checkpoint_bytes, results.kv_cache_tokens
    cache = f"{results.kv_cache_bytes / 2**20:.0f} MiB"
    return [
        (
            "perplexity, reference",
            f"{ppl['bf16_reference']:.3f}",
            f"{ppl['resq_reference']:.3f}",
            f"naive W4A4KV4 {ppl['naive_rtn_reference']:.3f}",
        ),
        (
            "perplexity, through vLLM",
            f"{ppl['bf16_vllm']:.3f}",
            f"{ppl['resq_vllm']:.3f}",
            f"x {ppl['resq_vllm'] / ppl['bf16_vllm']:.3f}",
        ),
        ("checkpoint", megabytes(size["bf16"]), megabytes(size["resq"]), f"x {size['resq'] / size['bf16']:.2f}"),
        (
            f"KV-cache tokens in {cache}",
            f"{tokens['bf16']:,}",
            f"{tokens['resq']:,}",
            f"x {tokens['resq'] / tokens['bf16']:.2f}",
        ),
        (
            "generated tokens/s, 8 at once",
            f"{rate['median']['bf16']:.0f}",
            f"{rate['median']['resq']:.0f}",
            f"x {rate['ratio']['resq']:.2f} (median of pairs)",
        ),
    ]


def print_report(console: Console, results: DemoResults) -> None:
    """Print the comparison."""
    table = Table(title=f"the bundled model in vLLM, {results.date}")
    table.add_column("")
    table.add_column("bf16", justify="right")
    table.add_column("ResQ W4A4KV4, 1/8 at 8 bits", justify="right")
    table.add_column("ResQ against bf16", justify="right")
    for row in rows(results):
        table.add_row(*row)
    console.print()
    console.print(table)
    console.print(
        f"took {results.seconds:.0f} s; the quantization took {results.quantize_seconds:.0f} s", highlight=False
    )
