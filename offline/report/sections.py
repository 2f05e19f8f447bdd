"""The report's sections on accuracy, size and recipe; :mod:`offline.report.quality` has bases and errors."""

from __future__ import annotations

from offline.report.blocks import Plot, Section, Table
from offline.report.comparison import Comparison
from offline.report.data import ReportData
from offline.report.plots.comparison import perplexity_scatter
from offline.report.plots.sizes import byte_bars
from offline.report.stats import PerplexityRecord
from offline.report.text import byte_size, change, perplexity
from resq_vllm.formats.metadata import LM_HEAD, SITES, LinearSite

AGAIN = "Quantize the model again with this release to have them here."


def accuracy(data: ReportData) -> Section:
    """Perplexity before and after, as measured at the end of ``resq quantize``."""
    before, after = (data.stats.perplexity_before, data.stats.perplexity_after) if data.stats else (None, None)
    if before is None or after is None:
        reason = (
            "This checkpoint was written by a release that kept no perplexities. " + AGAIN
            if data.stats is None
            else "Perplexity was not measured when this model was quantized (--eval-windows 0)."
        )
        return Section("accuracy", "Accuracy", absent=f"{reason} resq eval measures it at any time.")
    rows = (
        (data.base_model, perplexity(before.value), ""),
        (f"{data.name} (this checkpoint)", perplexity(after.value), change(before.value, after.value)),
    )
    table = Table(_protocol(after), ("model", "perplexity", "change"), rows, strong=frozenset({1}), wrap=True)
    text = (
        "Perplexity is the effective number of tokens that the model hesitates between: lower is better. Everything is "
        "rounded that is rounded when serving: weights, activations and KV cache."
    )
    return Section("accuracy", "Accuracy", (text,), tables=(table,))


def _protocol(record: PerplexityRecord) -> str:
    return (
        f"Perplexity on the {record.dataset}: {record.sequences} {record.protocol} of at most {record.seqlen:,} "
        f"tokens, {record.tokens:,} predicted tokens, both models on the same ones."
    )


def comparison(found: Comparison) -> Section:
    """Table and scatter plot of ``--compare``."""
    rows = sorted(found.rows, key=lambda row: row.ppl)
    table = Table(
        f"Methods on {found.model}, best first, and their bits: averages over all quantized layers, with what a method "
        "keeps high counted in.",
        ("method", "perplexity", "weights", "activations", "KV", "average"),
        tuple(
            (
                row.name,
                perplexity(row.ppl),
                *(f"{bits:.2f}" for bits in (row.weight_bits, row.activation_bits, row.kv_bits, row.average_bits)),
            )
            for row in rows
        ),
        strong=frozenset(i for i, row in enumerate(rows) if row.method.startswith("resq")),
    )
    finite = [row for row in rows if row.ppl != float("inf")]
    plots = (
        Plot(
            "comparison",
            "Perplexity against average bits",
            "Lower and further left is better: a method beats every other that lies above it and to its right.",
            "Scatter plot of perplexity against average bits, one point a method.",
            perplexity_scatter(finite),
        ),
    )
    text = f"The same protocol for every method, on {found.model}."
    return Section(
        "comparison", "Comparison with other methods", (text,), plots=plots if finite else (), tables=(table,)
    )


def size_parts(data: ReportData) -> list[tuple[str, int, int]]:
    """(part, bytes in the files, bytes of the same tensors in 16 bits), without parts that are empty."""
    found = data.contents
    weights = sum(site.weights for site in found.sites)
    low = sum(site.low_bytes for site in found.sites)
    high = sum(site.high_bytes for site in found.sites)
    scales = sum(site.scale_bytes for site in found.sites)
    # Every high weight is one byte, so the low part's count is what remains.
    parts = [
        (f"low weights ({_bits(data, 'low')} bit)", low, 2 * (weights - high)),
        (f"high weights ({_bits(data, 'high')} bit)", high, 2 * high),
        ("weight scales", scales, 0),
        ("low-rank corrections", sum(site.correction_bytes for site in found.sites), 0),
        ("embedding", found.embedding_bytes, found.embedding_bytes),
        (
            f"lm_head ({found.lm_head_weight_bits:.3g} bit)",
            found.lm_head_bytes,
            found.lm_head_bytes if found.lm_head_bits == 16 else 2 * found.lm_head_weights,
        ),
        ("key rotations (U_C)", found.rotation_bytes, 0),
        ("norms, biases, 16-bit layers", found.other_bytes, found.other_bytes),
    ]
    return [part for part in parts if part[1]]


def _bits(data: ReportData, part: str) -> str:
    kinds = {getattr(site, f"weight_{part}_bits") for site in data.metadata.sites.values() if getattr(site, part)}
    return "/".join(str(bits) for bits in sorted(kinds))


def size(data: ReportData) -> Section:
    """Bytes of the files by part, and KV bytes a token."""
    found = data.contents
    parts = size_parts(data)
    total, plain = sum(part[1] for part in parts), sum(part[2] for part in parts)
    rows = [
        (name, byte_size(size), f"{100 * size / total:.1f} %", byte_size(wide) if wide else "–")
        for name, size, wide in parts
    ]
    rows.append(("total", byte_size(total), "100 %", byte_size(plain)))
    table = Table(
        "Tensors in the files, and the same in 16 bits (lm_head stands for itself there, also where it was tied).",
        ("part", "bytes", "share", "in 16 bits"),
        tuple(rows),
        strong=frozenset({len(rows) - 1}),
    )
    kv = Table(
        "K and V of all layers and kv heads, for one token.",
        ("KV cache", "bytes a token"),
        (
            ("this checkpoint", f"{found.kv_bytes_per_token:,}"),
            ("bf16", f"{found.kv_bytes_per_token_bf16:,}"),
            ("tokens in the same memory", f"{data.kv_ratio:.2f}×"),
        ),
        strong=frozenset({0}),
    )
    plots = (
        Plot(
            "bytes",
            "Checkpoint by part",
            "The longest bar is where the next byte can be saved; in small models that is often embedding and lm_head.",
            "Bar chart of the checkpoint's bytes by part.",
            byte_bars([(name, size) for name, size, _ in parts]),
        ),
        Plot(
            "kv-bytes",
            "KV cache of one token",
            f"The same memory holds {data.kv_ratio:.2f} times as many tokens as with a bf16 cache.",
            "Bar chart of KV-cache bytes a token, this checkpoint beside bf16.",
            byte_bars(
                [("this checkpoint", found.kv_bytes_per_token), ("bf16", found.kv_bytes_per_token_bf16)], ["bf16"]
            ),
        ),
    )
    return Section("size", "Size", plots=plots, tables=(table, kv))


def recipe(data: ReportData) -> Section:
    """Bits of the sites, options, and the command that serves it."""
    linears: dict[str, LinearSite] = {name: data.metadata.sites[name] for name in SITES}
    if data.metadata.lm_head_site is not None:
        linears[LM_HEAD] = data.metadata.lm_head_site
    sites = Table(
        "What the inputs and weights of every linear layer become.",
        ("input of", "columns", "weight bits", "activation bits", "activation scales", "Hadamard blocks"),
        tuple(_site_row(name, site) for name, site in linears.items()),
        text_columns=6,
    )
    kinds: dict[str, int] = {}
    for layer in data.metadata.kv_cache:
        low = data.metadata.head_dim - layer.high
        kind = f"{low} dims at {layer.low_bits} bits" + (f" + {layer.high} at 8 bits" if layer.high else "")
        kinds[kind] = kinds.get(kind, 0) + 1
    options = [(key, str(value)) for key, value in data.metadata.recipe.items()]
    options += [("high_fraction", f"{data.metadata.high_fraction:g}"), ("max_tp", str(data.metadata.max_tp))]
    options += [("KV cache, a head", "; ".join(f"{kind} ({count} layers)" for kind, count in kinds.items()))]
    head = [LM_HEAD] * (LM_HEAD not in linears)
    options += [("left in 16 bits", ", ".join(["embedding", *head, "norms", *data.metadata.ignore]))]
    options += [("written by", f"resq-vllm {data.metadata.tool_version}, format {data.metadata.format_version}")]
    table = Table("How it was made.", ("option", "value"), tuple(options), text_columns=2, wrap=True)
    text = "The checkpoint carries its own settings, so serving needs no flag of its own:"
    return Section("recipe", "Recipe and serving", (text,), data.serve_command, tables=(sites, table))


def _site_row(name: str, site: LinearSite) -> tuple[str, ...]:
    columns = " + ".join(f"{count:,}" for count in (site.low, site.high) if count)
    weights = [site.weight_low_bits] * bool(site.low) + [site.weight_high_bits] * bool(site.high)
    one_scale = site.scales == "token"
    inputs = [site.act_low_bits] * bool(site.low or one_scale) + [site.act_high_bits] * bool(
        site.high and not one_scale
    )
    scales = "one a token" if one_scale else f"a token and {site.scales}"
    hadamard = str(site.hadamard_groups) if site.hadamard_groups else "–"
    return name, columns, " / ".join(map(str, weights)), " / ".join(map(str, inputs)), scales, hadamard
