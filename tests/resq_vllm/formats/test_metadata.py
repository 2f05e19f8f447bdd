"""quantization_config: round trip, and a sentence for every way of being wrong."""

from __future__ import annotations

from typing import Any

import pytest

from resq_vllm.errors import ResQError
from resq_vllm.formats.metadata import (
    KVLayer,
    LinearSite,
    LMHeadBits,
    QuantizationMetadata,
    format_version,
    head_site,
    high_count,
)
from resq_vllm.formats.plan import HIGH, LOW, LinearPlan, Segment, linear_plan


def valid() -> dict[str, Any]:
    site = LinearSite(low=224, high=32)
    metadata = QuantizationMetadata(
        tool_version="0.1.0",
        high_fraction=0.125,
        head_dim=64,
        sites={"qkv": site, "o": site, "gate_up": site, "down": LinearSite(low=768, high=0, hadamard_groups=8)},
        kv_cache=[KVLayer(high=8)],
    )
    return metadata.model_dump()


def test_round_trip() -> None:
    assert QuantizationMetadata.from_dict(valid()).model_dump() == valid()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"format_version": 5}, r"config.json: format_version 5 is unknown .* reads formats 1 to 4"),
        ({"lm_head_bits": 8}, r"lm_head_bits = 8 is of format 3, not 2"),
        ({"lm_head_bits": 4, "format_version": 3}, r"lm_head_bits = 4 is of format 4, not 3"),
        ({"lm_head_bits": 6, "format_version": 4}, r"field lm_head_bits is invalid"),
        ({"lm_head_bits": 8, "format_version": 3, "ignore": ["lm_head"]}, r"lm_head .* although lm_head_bits is 8"),
        ({"lm_head_bits": 4, "format_version": 4, "ignore": ["lm_head"]}, r"lm_head .* although lm_head_bits is 4"),
        ({"quant_method": "awq"}, r"quant_method is 'awq'.* not quantized by resq"),
        ({"head_dim": 0}, r"field head_dim is invalid"),
        ({"colour": "red"}, r"field colour is invalid"),
        ({"sites": {}}, r"sites lacks qkv, o, gate_up, down"),
    ],
)
def test_invalid_field_is_named(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ResQError, match=sentence):
        QuantizationMetadata.from_dict(valid() | change, "config.json")


@pytest.mark.parametrize(
    ("site", "reason"),
    [
        ({"low": 224, "high": 32, "scales": "head"}, "order = heads"),
        ({"low": 224, "high": 32, "scales": "block"}, "need hadamard_groups or scale_groups"),
        ({"low": 100, "high": 0, "hadamard_groups": 8}, "hadamard_groups = 8 does not divide"),
        ({"low": 0, "high": 0}, "both 0"),
        ({"low": 256, "high": 0, "scales": "token", "scale_groups": 4}, "scale_groups need scales = block"),
        ({"low": 256, "high": 0, "scales": "block", "scale_groups": 3}, "scale_groups = 3 does not divide"),
        ({"low": 252, "high": 4, "scales": "block", "scale_groups": 8}, "scale_groups = 8 does not divide"),
        (
            {"low": 256, "high": 0, "scales": "block", "scale_groups": 8, "hadamard_groups": 4},
            "hadamard_groups = 4 is no multiple of scale_groups = 8",
        ),
        (
            {"low": 224, "high": 32, "scales": "block", "scale_groups": 2, "hadamard_groups": 4},
            "a Hadamard block of 64 columns straddles",
        ),
        ({"low": 224, "high": 32, "weight_group": 64}, "weight_group = 64 does not divide 224"),
        ({"low": 0, "high": 32, "weight_group": 32}, "weight_group = 32 does not divide 0"),
        ({"low": 224, "high": 32, "low_rank": -1}, "low_rank"),
    ],
)
def test_contradictory_sites_are_refused(site: dict[str, Any], reason: str) -> None:
    config = valid()
    config["sites"]["o"] = site
    with pytest.raises(ResQError, match=rf"field sites\.o.*{reason}"):
        QuantizationMetadata.from_dict(config)


def test_format_1_is_read_as_before() -> None:
    site = {"low": 224, "high": 32}
    down = {"low": 768, "high": 0, "scales": "block", "hadamard_groups": 8}
    sites = {"qkv": site, "o": site, "gate_up": site, "down": down}
    metadata = QuantizationMetadata.from_dict(valid() | {"format_version": 1, "sites": sites})
    assert metadata.format_version == 1
    assert (metadata.sites["down"].scale_blocks, metadata.sites["down"].weight_groups) == (8, 1)


def test_eight_bit_lm_head_is_as_wide_as_the_residual_stream() -> None:
    plain = QuantizationMetadata.from_dict({key: value for key, value in valid().items() if key != "lm_head_bits"})
    assert (plain.lm_head_bits, plain.lm_head_site) == (16, None)
    metadata = QuantizationMetadata.from_dict(valid() | {"lm_head_bits": 8, "format_version": format_version(8)})
    assert metadata.lm_head_site == LinearSite(low=0, high=256)
    assert linear_plan(metadata.lm_head_site, 256, 64) == LinearPlan((Segment(256, HIGH, 0),), (8,))


def test_four_bit_lm_head_has_the_residual_streams_high_columns() -> None:
    metadata = QuantizationMetadata.from_dict(valid() | {"lm_head_bits": 4, "format_version": format_version(4)})
    qkv = metadata.sites["qkv"]
    site = metadata.lm_head_site
    assert site is not None
    assert site == LinearSite(low=qkv.low, high=qkv.high, act_low_bits=8)
    assert (qkv.low, qkv.high) == (224, 32)
    assert linear_plan(site, 256, 64) == LinearPlan((Segment(224, LOW, 0), Segment(32, HIGH, 1)), (8, 8))
    assert metadata.lm_head_weight_bits == 4.5


@pytest.mark.parametrize("bits", [8, 16])
def test_bits_of_a_head_without_a_low_part(bits: LMHeadBits) -> None:
    metadata = QuantizationMetadata.from_dict(valid() | {"lm_head_bits": bits, "format_version": format_version(bits)})
    assert metadata.lm_head_weight_bits == bits


def test_uniform_head_has_no_high_part() -> None:
    assert head_site(4, 256, 0) == LinearSite(low=256, high=0, act_low_bits=8)


def test_only_a_quantized_lm_head_asks_for_a_newer_release() -> None:
    assert (format_version(16), format_version(8), format_version(4)) == (2, 3, 4)


@pytest.mark.parametrize(
    "newer",
    [{"weight_group": 32}, {"low_rank": 8}, {"scales": "block", "scale_groups": 8}],
)
def test_format_2_fields_in_a_format_1_file_are_refused(newer: dict[str, Any]) -> None:
    config = valid() | {"format_version": 1}
    config["sites"]["o"] = {"low": 256, "high": 0} | newer
    with pytest.raises(ResQError, match=r"sites\.o\.\w+ is of format 2, not 1"):
        QuantizationMetadata.from_dict(config)


@pytest.mark.parametrize(
    ("dim", "fraction", "high"),
    [(4096, 1 / 8, 512), (896, 1 / 8, 112), (80, 1 / 8, 10), (64, 0, 0), (128, 1 / 4, 32), (36, 1 / 8, 4)],
)
def test_high_count_is_even(dim: int, fraction: float, high: int) -> None:
    assert high_count(dim, fraction) == high
