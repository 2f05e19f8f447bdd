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


Row = tuple[str, str, str, str, str]


def _row(quantity: str, bf16: float, resq: float, form: str, naive: float | None = None) -> Row:
    shown = "" if naive is None else format(naive, form)
    return quantity, format(bf16, form), shown, format(resq, form), f"x {resq / bf16:.3f}"


def rows(results: DemoResults) -> list[Row]:
    """Lines of the table: quantity, bf16, naive rounding to 4 bits where it was measured, ResQ, ResQ against bf16."""
    perplexity, rate = results.perplexity, results.tokens_per_second
    size, tokens = results.checkpoint_bytes, results.kv_cache_tokens
    naive = perplexity["naive_rtn_reference"]
    cache = f"{results.kv_cache_bytes / 2**20:.0f} MiB"
    lines = [
        _row("perplexity in torch", perplexity["bf16_reference"], perplexity["resq_reference"], ".3f", naive),
        _row("perplexity in vLLM", perplexity["bf16_vllm"], perplexity["resq_vllm"], ".3f"),
        _row("checkpoint, MB", size["bf16"] / 1e6, size["resq"] / 1e6, ".2f"),
        _row(f"KV tokens in {cache}", tokens["bf16"], tokens["resq"], ",d"),
    ]
    # Not the quotient of the two medians: the ratio is taken round by round, and its median is shown.
    bf16, ours = (format(rate["median"][name], ".0f") for name in ("bf16", "resq"))
    return [*lines, ("tokens/s, 8 requests", bf16, "", ours, f"x {rate['ratio']['resq']:.3f}")]


def print_report(console: Console, results: DemoResults) -> None:
    """Print the comparison."""
    table = Table(title=f"the bundled model in vLLM, {results.date}")
    table.add_column("")
    table.add_column("bf16", justify="right")
    table.add_column("naive W4A4", justify="right")
    table.add_column("ResQ", justify="right")
    table.add_column("ResQ / bf16", justify="right")
    for row in rows(results):
        table.add_row(*row)
    console.print()
    console.print(table)
    console.print(
        f"took {results.seconds:.0f} s; the quantization took {results.quantize_seconds:.0f} s", highlight=False
    )
