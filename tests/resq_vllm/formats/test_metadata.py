"""quantization_config: round trip, and a sentence for every way of being wrong."""

from __future__ import annotations

from typing import Any

import pytest

from resq_vllm.errors import ResQError
from resq_vllm.formats.metadata import KVLayer, LinearSite, QuantizationMetadata, high_count


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
        ({"format_version": 2}, r"config.json: format_version 2 is unknown .* reads format 1"),
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
    "site",
    [
        {"low": 224, "high": 32, "scales": "head"},
        {"low": 224, "high": 32, "scales": "block"},
        {"low": 100, "high": 0, "hadamard_groups": 8},
        {"low": 0, "high": 0},
    ],
)
def test_contradictory_sites_are_refused(site: dict[str, Any]) -> None:
    config = valid()
    config["sites"]["o"] = site
    with pytest.raises(ResQError, match=r"field sites\.o"):
        QuantizationMetadata.from_dict(config)


@pytest.mark.parametrize(
    ("dim", "fraction", "high"),
    [(4096, 1 / 8, 512), (896, 1 / 8, 112), (80, 1 / 8, 10), (64, 0, 0), (128, 1 / 4, 32), (36, 1 / 8, 4)],
)
def test_high_count_is_even(dim: int, fraction: float, high: int) -> None:
    assert high_count(dim, fraction) == high
