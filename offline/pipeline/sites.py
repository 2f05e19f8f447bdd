"""From options and model sizes to the metadata: which columns are high, and which activations share a scale."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, Protocol

from offline.models.adapter import SITE_LINEARS, ModelAdapter
from offline.pipeline.options import OutputScales, QuantizeOptions
from offline.rotate.spec import DownLayout, down_layout
from resq_vllm import __version__
from resq_vllm.errors import ResQError
from resq_vllm.formats.metadata import (
    LM_HEAD,
    KVLayer,
    LinearSite,
    QuantizationMetadata,
    SiteName,
    format_version,
    high_count,
)

_O_SCALES: dict[OutputScales, Literal["part", "block", "head"]] = {
    "token8": "part",
    "part": "part",
    "kv": "block",
    "head": "head",
}


class SiteOptions(Protocol):
    """What the sites are made of: the options of ``resq quantize``, or a method's own."""

    @property
    def high_fraction(self) -> float: ...
    @property
    def low_bits(self) -> int: ...
    @property
    def o_scales(self) -> OutputScales: ...
    @property
    def down_act_bits(self) -> Literal[4, 8] | None: ...
    @property
    def down_high_fraction(self) -> float | None: ...
    @property
    def kv_bits(self) -> tuple[Literal[4, 8, 16], ...]: ...
    @property
    def max_tp(self) -> int: ...
    @property
    def down_groups(self) -> int: ...


def build_down_layout(adapter: ModelAdapter, options: SiteOptions) -> DownLayout:
    """How down_proj's channels are ordered and cut."""
    fraction = options.high_fraction if options.down_high_fraction is None else options.down_high_fraction
    return down_layout(adapter.intermediate_size, fraction, options.max_tp, options.down_groups)


def build_sites(adapter: ModelAdapter, options: SiteOptions) -> dict[SiteName, LinearSite]:
    """The four linear sites. ``--high-fraction 0`` is rotation and uniform low bits, o_proj's activations included."""
    high = high_count(adapter.hidden_size, options.high_fraction)
    head_high = high_count(adapter.head_dim, options.high_fraction)
    # Widths below 4 exist in measurements alone, which put their bits into the finished plan.
    low_bits: Literal[4, 8] = 8 if options.low_bits == 8 else 4
    residual = LinearSite(low=adapter.hidden_size - high, high=high, weight_low_bits=low_bits, act_low_bits=low_bits)
    token8 = options.o_scales == "token8" and head_high > 0
    heads = adapter.num_heads
    down = build_down_layout(adapter, options)
    return {
        "qkv": residual,
        "o": LinearSite(
            low=heads * (adapter.head_dim - head_high),
            high=heads * head_high,
            weight_low_bits=low_bits,
            act_low_bits=8 if token8 else low_bits,
            scales="token" if token8 else _O_SCALES[options.o_scales],
            scale_groups=adapter.num_kv_heads if options.o_scales == "kv" else 0,
            order="heads",
        ),
        "gate_up": residual,
        "down": LinearSite(
            low=down.groups * (down.width // down.groups - down.high),
            high=down.groups * down.high,
            weight_low_bits=low_bits,
            act_low_bits=options.down_act_bits or low_bits,
            scales="block",
            scale_groups=down.groups,
            hadamard_groups=down.hadamard_groups,
        ),
    }


def build_kv_layers(adapter: ModelAdapter, options: SiteOptions) -> list[KVLayer]:
    """One entry a layer. Raises ResQError when --kv-bits lists another number of layers."""
    bits = options.kv_bits * adapter.num_layers if len(options.kv_bits) == 1 else options.kv_bits
    if len(bits) != adapter.num_layers:
        raise ResQError(f"--kv-bits lists {len(bits)} layers, but the model has {adapter.num_layers}")
    high = high_count(adapter.head_dim, options.high_fraction)
    return [KVLayer(low_bits=b, high=high if b == 4 else 0) for b in bits]


def ignored_modules(adapter: ModelAdapter, patterns: Sequence[str]) -> list[str]:
    """Module names left in the model's dtype (rotated, not quantized).

    A pattern is a module name, a prefix of one that ends at a dot, or ``re:`` and a regular expression. q, k, v (and
    gate, up) run as one fused layer, so they can only be ignored together. Raises ResQError for a pattern that
    matches nothing, and for half of a fused layer.
    """
    names = [adapter.linear(layer, n) for layer in range(adapter.num_layers) for s in SITE_LINEARS.values() for n in s]
    chosen: set[str] = {LM_HEAD} & set(patterns)
    for pattern in patterns:
        if pattern == LM_HEAD:  # not quantized unless --lm-head-bits says so; naming it is a habit from other tools
            continue
        if pattern.startswith("re:"):
            found = {n for n in names if re.search(pattern[3:], n)}
        else:
            found = {n for n in names if n == pattern or n.startswith(pattern + ".") or n.endswith("." + pattern)}
        if not found:
            raise ResQError(f"--ignore-layers {pattern!r} matches no linear layer; names look like {names[0]}")
        chosen |= found
    for layer in range(adapter.num_layers):
        for linears in SITE_LINEARS.values():
            group = [adapter.linear(layer, n) for n in linears]
            inside = [n for n in group if n in chosen]
            if inside and len(inside) < len(group):
                raise ResQError(
                    f"--ignore-layers takes {', '.join(inside)} but not the rest of its fused layer; "
                    f"name all of {', '.join(group)}"
                )
    return sorted(chosen)


def build_metadata(adapter: ModelAdapter, options: QuantizeOptions) -> QuantizationMetadata:
    """The whole quantization_config; raises ResQError where options and model do not fit."""
    return QuantizationMetadata(
        format_version=format_version(options.lm_head_bits),
        tool_version=__version__,
        high_fraction=options.high_fraction,
        head_dim=adapter.head_dim,
        max_tp=options.max_tp,
        sites=build_sites(adapter, options),
        kv_cache=build_kv_layers(adapter, options),
        lm_head_bits=options.lm_head_bits,
        ignore=ignored_modules(adapter, options.ignore_layers),
        recipe=options.recipe(),
    )
