"""The report as one HTML page: summary, contents and sections, with the figures inlined."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence

from jinja2 import Environment, PackageLoader, StrictUndefined

from offline.report import quality, sections
from offline.report.blocks import Section, Tile
from offline.report.data import ReportData
from offline.report.text import byte_size, change, percent, perplexity


def build_sections(data: ReportData) -> list[Section]:
    """In page order."""
    found = [sections.accuracy(data)]
    if data.comparison is not None:
        found.append(sections.comparison(data.comparison))
    return [
        *found,
        quality.bases(data),
        quality.errors(data),
        quality.kv(data),
        sections.size(data),
        sections.recipe(data),
    ]


def tiles(data: ReportData) -> list[Tile]:
    """The key numbers, those that are known."""
    found: list[Tile] = []
    stats = data.stats
    if stats and stats.perplexity_before and stats.perplexity_after:
        before, after = stats.perplexity_before.value, stats.perplexity_after.value
        found.append(Tile(perplexity(after), "perplexity", f"16 bits: {perplexity(before)} ({change(before, after)})"))
    found.append(Tile(f"{data.contents.average_bits:.2f}", "bits a packed weight", "scales included; was 16"))
    found.append(
        Tile(
            f"{data.kv_ratio:.2f}×",
            "KV-cache tokens",
            f"{data.contents.kv_bytes_per_token:,} bytes each; bf16: {data.contents.kv_bytes_per_token_bf16:,}",
        )
    )
    plain = sum(wide for _, _, wide in sections.size_parts(data))
    found.append(Tile(byte_size(data.contents.total_bytes), "checkpoint", f"16 bits: {byte_size(plain)}"))
    return found


def summary(data: ReportData) -> str:
    """One paragraph with the key numbers."""
    opening = (
        f"This checkpoint is {data.base_model}, quantized with {data.method_label} by resq-vllm "
        f"{data.metadata.tool_version}: "
        f"{data.contents.layers} decoder layers at {data.contents.average_bits:.2f} bits a packed weight, and a KV "
        f"cache of {data.contents.kv_bytes_per_token:,} bytes a token."
    )
    sentences = [opening]
    stats = data.stats
    if stats and stats.perplexity_before and stats.perplexity_after:
        before, after = stats.perplexity_before, stats.perplexity_after
        sentences.append(
            f"Its perplexity is {perplexity(after.value)} where the original has {perplexity(before.value)} "
            f"({change(before.value, after.value)}, {after.tokens:,} tokens of the {after.dataset})."
        )
    if data.bases is not None and data.high_hidden:
        share = float(data.bases.captured(data.high_hidden, data.high_head).residual)
        sentences.append(
            f"The {percent(data.metadata.high_fraction)} of the residual stream's directions that stay at 8 bits hold "
            f"{percent(share)} of its second moment."
        )
    errors = quality.output_errors(stats) if stats else None
    if errors is not None:
        sentences.append(
            f"A linear layer's output is off by {percent(errors[1])} of its energy (geometric mean over layers and "
            f"sites); rounding to nearest without rotation, at the same bits, would make it {percent(errors[0])}."
        )
    return " ".join(sentences)


def render(data: ReportData, parts: Sequence[Section], images: Mapping[str, bytes]) -> str:
    """HTML; ``images``: the PNG of every plot of ``parts``, by its name."""
    environment = Environment(
        loader=PackageLoader("offline.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    encoded = {name: base64.b64encode(png).decode("ascii") for name, png in images.items()}
    return environment.get_template("page.html.j2").render(
        data=data, summary=summary(data), tiles=tiles(data), sections=parts, images=encoded
    )
