"""Model folders without weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from benchmarks.dummy_model import CONFIGS, SHAPES, resq_config, write_models
from benchmarks.scenarios import SCENARIOS
from resq_vllm.errors import ResQError
from resq_vllm.formats.metadata import QuantizationMetadata


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_models_differ_in_nothing_but_the_quantization(tmp_path: Path, shape: str) -> None:
    names = [name for name in CONFIGS if name not in ("empty", "resq-lm8")]
    models = write_models(tmp_path, SHAPES[shape].with_vocabulary(32000), names)
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


def test_lm_head_bits_that_no_release_has() -> None:
    with pytest.raises(ResQError, match="lm_head of 3 bits: field lm_head_bits is invalid"):
        resq_config(SHAPES["small"], lm_head_bits=3)


def test_empty_model_has_hardly_any_weights() -> None:
    config = CONFIGS["empty"](SHAPES["1b"])
    assert config["hidden_size"] * (config["intermediate_size"] + 2 * config["vocab_size"]) < 2**20
