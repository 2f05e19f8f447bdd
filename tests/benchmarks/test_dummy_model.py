"""Model folders without weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from benchmarks.dummy_model import CONFIGS, SHAPES, write_models
from benchmarks.scenarios import SCENARIOS
from resq_vllm.formats.metadata import QuantizationMetadata


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_models_differ_in_nothing_but_the_quantization(tmp_path: Path, shape: str) -> None:
    models = write_models(tmp_path, SHAPES[shape].with_vocabulary(32000), CONFIGS)
    configs = {name: json.loads((path / "config.json").read_text()) for name, path in models.items()}
    metadata = QuantizationMetadata.from_dict(configs["resq"]["quantization_config"])
    plain = configs["bf16"]
    for config in configs.values():
        assert {key: value for key, value in config.items() if key != "quantization_config"} == plain
    assert plain["hidden_size"] == SHAPES[shape].hidden_size
    assert plain["vocab_size"] == 32000
    assert metadata.sites["qkv"].low + metadata.sites["qkv"].high == SHAPES[shape].hidden_size
    assert len(metadata.kv_cache) == SHAPES[shape].num_hidden_layers
    assert len(AutoTokenizer.from_pretrained(models["resq"])) <= plain["vocab_size"]


def test_longest_scenario_has_positions() -> None:
    positions = CONFIGS["bf16"](SHAPES["1b"])["max_position_embeddings"]
    assert max(scenario.prompt + scenario.output for scenario in SCENARIOS) < positions


@pytest.mark.parametrize(("name", "bits"), [("resq-lm8", 8), ("resq-lm4", 4)])
def test_quantized_lm_head_is_all_that_differs(name: str, bits: int) -> None:
    plain, head = (CONFIGS[name](SHAPES["small"])["quantization_config"] for name in ("resq", name))
    assert QuantizationMetadata.from_dict(head).lm_head_bits == bits
    assert {key for key in head if head[key] != plain[key]} == {"lm_head_bits", "format_version"}
