"""The model card (README.md) of a checkpoint: what it is, how it was made, what it costs, how to serve it."""

from __future__ import annotations

import json
import re
from pathlib import Path

from offline.evaluate.perplexity import Perplexity
from offline.inspect import kv_bytes_per_head
from offline.models.source import ModelSource
from resq_vllm.formats.metadata import LM_HEAD, SITES, LinearSite, QuantizationMetadata

LICENCE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
_CHAT = """\
reply = client.chat.completions.create(
    model="{name}", messages=[{{"role": "user", "content": "Tell me a story."}}], max_tokens=64
)
print(reply.choices[0].message.content)"""
_COMPLETION = """\
reply = client.completions.create(model="{name}", prompt="Once upon a time", max_tokens=64)
print(reply.choices[0].text)"""


def model_card(
    source: ModelSource,
    metadata: QuantizationMetadata,
    name: str,
    before: Perplexity | None,
    after: Perplexity | None,
) -> str:
    """Markdown text with YAML front matter.

    Args:
        source: the model that was quantized: its licence and chat template.
        metadata: of the checkpoint.
        name: the checkpoint's folder name, as in ``vllm serve NAME``.
        before: perplexity of the source model, or None when it was not measured.
        after: of the checkpoint, on the same sequences.

    """
    base = str(metadata.recipe.get("model", source.folder.name))
    licence = declared_licence(source.folder)
    sections = [
        _front_matter(base, licence),
        f"# {name}",
        _summary(metadata, base),
        _serve(metadata, name),
        _client(source.folder, name),
        _accuracy(before, after),
        _recipe(metadata),
        _licence(source.folder, licence, base),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def declared_licence(folder: Path) -> str | None:
    """The ``license`` of the source model's own card, or None when it has no card or names none."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    front = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    found = re.search(r"^license:[ \t]*([^\s#]+)", front.group(1), re.MULTILINE) if front else None
    return found.group(1).strip("'\"") if found else None


def has_chat_template(folder: Path) -> bool:
    """Whether the tokenizer comes with one, as a file of its own or in tokenizer_config.json."""
    if any(folder.glob("chat_template*")):
        return True
    config = folder / "tokenizer_config.json"
    return config.is_file() and '"chat_template"' in config.read_text(encoding="utf-8", errors="replace")


def _front_matter(base: str, licence: str | None) -> str:
    lines = ["library_name: vllm", "pipeline_tag: text-generation", f"base_model: {json.dumps(base)}"]
    lines += ["base_model_relation: quantized", "tags: [resq, vllm, quantized, 4-bit]"]
    if licence:
        lines.append(f"license: {json.dumps(licence)}")
    return "---\n" + "\n".join(lines) + "\n---"


def _summary(metadata: QuantizationMetadata, base: str) -> str:
    plain = 4 * metadata.head_dim * len(metadata.kv_cache)
    site = metadata.sites["qkv"]
    share = f", {metadata.high_fraction:.1%} of both in {site.weight_high_bits} bits" if site.high else ""
    method, paper = "ResQ", "2412.14363"
    if site.low_rank:
        method, paper = str(metadata.recipe.get("method", "LQER")), "2402.02446"
        share += f", a correction of rank {site.low_rank}"
    ratio = plain / kv_bytes_per_head(metadata)
    cache = "a 16-bit KV cache" if ratio == 1 else f"a KV cache {ratio:.2f} times smaller than bf16"
    share += f", lm_head in {metadata.lm_head_weight_bits:.3g} bits" if metadata.lm_head_site else ""
    return (
        f"{base} quantized with {method} ([arXiv {paper}](https://arxiv.org/abs/{paper})) by resq-vllm "
        f"{metadata.tool_version}: weights in {site.weight_low_bits} and activations in {site.act_low_bits} "
        f"bits{share}, and {cache}."
    )


def _serve(metadata: QuantizationMetadata, name: str) -> str:
    return (
        f"## Serve\n\n```sh\npip install resq-vllm\nvllm serve {name}\n```\n\n"
        "The checkpoint carries its own settings: no quantization or KV cache flag is needed. Tensor parallelism: "
        f"degrees up to {metadata.max_tp} that divide the model's heads."
    )


def _client(folder: Path, name: str) -> str:
    call = (_CHAT if has_chat_template(folder) else _COMPLETION).format(name=name)
    return (
        "Ask it:\n\n```python\nfrom openai import OpenAI\n\n"
        f'client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")\n{call}\n```'
    )


def _accuracy(before: Perplexity | None, after: Perplexity | None) -> str:
    if before is None or after is None:
        return ""
    change = after.value / before.value - 1
    return (
        "## Accuracy\n\n| | perplexity |\n|---|---|\n"
        f"| original | {before.value:.3f} |\n| this checkpoint | {after.value:.3f} ({change:+.1%}) |\n\n"
        f"{after.dataset}: {after.sequences} {after.protocol} of at most {after.seqlen} tokens, {after.tokens} "
        "predicted tokens, everything quantized that is quantized when serving."
    )


def _recipe(metadata: QuantizationMetadata) -> str:
    rows = ["| input of | columns | weights | activations |", "|---|---|---|---|"]
    rows += [_site_row(name, metadata.sites[name]) for name in SITES]
    head = metadata.lm_head_site
    rows += [] if head is None else [_site_row(LM_HEAD, head)]
    kinds: dict[str, int] = {}
    for layer in metadata.kv_cache:
        low = f"{metadata.head_dim - layer.high} dims in {layer.low_bits} bits"
        kind = f"{low}, {layer.high} in 8 bits" if layer.high else f"{layer.low_bits} bits"
        kinds[kind] = kinds.get(kind, 0) + 1
    cache = "; ".join(f"{kind} ({layers} layers)" for kind, layers in kinds.items())
    plain = "Embedding, norms and lm_head" if head is None else "Embedding and norms"
    lines = [f"KV cache, a head: {cache}. {plain}: 16 bits."]
    if metadata.ignore:
        lines.append(f"Left in 16 bits: {', '.join(metadata.ignore)}.")
    options = [f"| {key} | {value} |" for key, value in metadata.recipe.items()]
    table = "\n".join(["| option | value |", "|---|---|", *options]) if options else ""
    return "\n\n".join(part for part in ("## Recipe", "\n".join(rows), " ".join(lines), table) if part)


def _site_row(name: str, site: LinearSite) -> str:
    weights = [f"{site.weight_low_bits} bits"] * bool(site.low) + [f"{site.weight_high_bits} bits"] * bool(site.high)
    activations = [f"{site.act_low_bits} bits"]
    if site.high and site.scales != "token":
        activations = [f"{site.act_low_bits} bits"] * bool(site.low) + [f"{site.act_high_bits} bits"]
    if site.weight_group:
        weights[0] += f" in groups of {site.weight_group}"
    if site.low_rank:
        weights[-1] += f", rank {site.low_rank}"
    columns = [str(count) for count in (site.low, site.high) if count]
    hadamard = f", Hadamard in {site.hadamard_groups} blocks" if site.hadamard_groups else ""
    scales = f"one scale a token and {site.scales}" if site.scales != "token" else "one scale a token"
    return f"| {name} | {' + '.join(columns)} | {' / '.join(weights)} | {' / '.join(activations)}, {scales}{hadamard} |"


def _licence(folder: Path, licence: str | None, base: str) -> str:
    files = sorted({path.name for pattern in LICENCE_FILES for path in folder.glob(pattern) if path.is_file()})
    terms = f"These weights are derived from {base}; its licence"
    terms += f" ({licence}) applies to them." if licence else " applies to them."
    copies = f" Copied from there: {', '.join(files)}." if files else ""
    return f"## Licence\n\n{terms}{copies} Quantization adds no terms of its own."
