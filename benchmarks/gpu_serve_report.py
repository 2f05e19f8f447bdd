"""Rows and table of benchmarks.gpu_serve from what every contender answered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from benchmarks.gpu_serve_contenders import BASELINE
from benchmarks.report import rounded

FIGURES = ("decode_tokens_s", "tpot_ms", "ttft_ms", "prefill_tokens_s", "output_tokens_s")


def rows(answers: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row a cell and contender, cells in their order; one without figures has its `reason`.

    answers: by contender {"kv_tokens", "cells", "wanted": keys of the cells, "reason": sentence or None}.
    ratio_to_bf16: of decode_tokens_s, None where bf16 has no figure.
    """
    wanted = list(dict.fromkeys(key for answer in answers.values() for key in answer["wanted"]))
    plain = answers.get(BASELINE, {}).get("cells", {})
    lines = []
    for key in wanted:
        streams, _, context = key.partition("x")
        for name, answer in answers.items():
            if key not in answer["wanted"]:
                continue
            found = answer["cells"].get(key, {"reason": answer["reason"] or "not reached"})
            line: dict[str, Any] = {"contender": name, "streams": int(streams), "context": int(context)}
            line |= {"kv_tokens": answer["kv_tokens"]}
            if "reason" in found:
                lines.append(line | {"reason": found["reason"]})
                continue
            base = plain.get(key, {}).get("decode_tokens_s")
            line |= {figure: rounded(found[figure]) for figure in FIGURES}
            lines.append(line | {"ratio_to_bf16": rounded(found["decode_tokens_s"] / base) if base else None})
    return lines


def table(title: str, lines: list[dict[str, Any]]) -> Table:
    """The rows for a terminal."""
    view = Table(title=title)
    for name in ("streams", "context", "contender", "decode tok/s", "× bf16", "TPOT ms", "TTFT ms", "KV tokens"):
        view.add_column(name, justify="left" if name == "contender" else "right")
    for line in lines:
        head = (str(line["streams"]), str(line["context"]), line["contender"])
        tokens = "–" if line["kv_tokens"] is None else f"{line['kv_tokens']:,}"
        if "reason" in line:
            view.add_row(*head, line["reason"][:60], "", "", "", tokens)
            continue
        ratio = "–" if line["ratio_to_bf16"] is None else f"{line['ratio_to_bf16']:.2f}"
        figures = (f"{line['decode_tokens_s']:.0f}", ratio, f"{line['tpot_ms']:.2f}", f"{line['ttft_ms']:.0f}")
        view.add_row(*head, *figures, tokens)
    return view
