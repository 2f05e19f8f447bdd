"""Rows and table of benchmarks.gpu_serve from what every contender answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from benchmarks.gpu_serve_contenders import BASELINE
from benchmarks.report import rounded

# Of the hot passes: median, and NAME_range.
HOT_FIGURES = ("decode_tokens_s", "tpot_ms", "output_tokens_s")
FIGURES = (*HOT_FIGURES, "ttft_ms", "prefill_tokens_s")
NOT_YET = "not measured yet"


def rows(answers: Mapping[str, Mapping[str, Any]], wanted: Sequence[str]) -> list[dict[str, Any]]:
    """A row a cell and contender, cells in the order of `wanted`; one without figures has its `reason`.

    answers: by contender {"kv_tokens", "cells"}. ratio_to_bf16: of decode_tokens_s, None where bf16 has no figure.
    """
    plain = answers.get(BASELINE, {}).get("cells", {})
    lines = []
    for key in wanted:
        streams, _, context = key.partition("x")
        for name, answer in answers.items():
            found = answer["cells"].get(key, {"reason": NOT_YET})
            line: dict[str, Any] = {"contender": name, "streams": int(streams), "context": int(context)}
            line |= {"kv_tokens": answer["kv_tokens"], "commit": found.get("commit")}
            if "reason" in found:
                lines.append(line | {"reason": found["reason"]})
                continue
            base = plain.get(key, {}).get("decode_tokens_s")
            line |= {figure: rounded(found[figure]) for figure in FIGURES}
            for figure in HOT_FIGURES:
                line[f"{figure}_range"] = [rounded(end) for end in found[f"{figure}_range"]]
            lines.append(line | {"ratio_to_bf16": rounded(found["decode_tokens_s"] / base) if base else None})
    return lines


def table(title: str, lines: list[dict[str, Any]]) -> Table:
    """The rows for a terminal."""
    view = Table(title=title)
    names = ("streams", "context", "contender", "decode tok/s", "range", "× bf16", "TPOT ms", "TTFT ms", "KV tokens")
    for name in names:
        view.add_column(name, justify="left" if name == "contender" else "right")
    for line in lines:
        head = (str(line["streams"]), str(line["context"]), line["contender"])
        tokens = "–" if line["kv_tokens"] is None else f"{line['kv_tokens']:,}"
        if "reason" in line:
            view.add_row(*head, line["reason"][:60], "", "", "", "", tokens)
            continue
        ratio = "–" if line["ratio_to_bf16"] is None else f"{line['ratio_to_bf16']:.2f}"
        low, high = line["decode_tokens_s_range"]
        decode = (f"{line['decode_tokens_s']:.0f}", f"{low:.0f}…{high:.0f}", ratio)
        view.add_row(*head, *decode, f"{line['tpot_ms']:.2f}", f"{line['ttft_ms']:.0f}", tokens)
    return view
