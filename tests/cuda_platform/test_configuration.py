"""What vLLM decides for our checkpoints on its CUDA platform, without a GPU: its own code, asked in another process."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.dummy_model import SHAPES, Shape, bf16_config, resq_config, write_model
from offline.bundled import MODEL_DIR
from tests.cuda_platform.support import decisions

LAYERS = 4
# Of the 8B shape a few layers: tokens of the cache per byte do not depend on their number.
HEAD_DIM_128 = replace(SHAPES["8b"], num_hidden_layers=LAYERS, vocab_size=4096)


def bundled_shape() -> Shape:
    config = json.loads((MODEL_DIR / "config.json").read_text())
    return Shape(**{name: config[name] for name in Shape.__dataclass_fields__})


NAMES = (
    "bf16",
    "resq",
    "bf16-64",
    "resq-64",
    "bf16-96",
    "resq-96",
    "bf16-window",
    "resq-window",
    "fp8-kv",
    "skip",
    "mixed",
    "block-32",
    "eager",
)


@pytest.fixture(scope="module")
def decided(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The decisions by name, of one process: its start takes longer than all of them."""
    folder = tmp_path_factory.mktemp("models")
    quantized = resq_config(HEAD_DIM_128)
    per_layer = json.loads(json.dumps(quantized))
    per_layer["quantization_config"]["kv_cache"][0] = {"low_bits": 16, "high": 0}
    per_layer["quantization_config"]["kv_cache"][1] = {"low_bits": 8, "high": 0}
    shape_96 = replace(HEAD_DIM_128, hidden_size=3072, head_dim=96)
    window = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 1024}
    bf16, resq, mixed, small, small_resq, of_96, resq_96, windowed, resq_windowed = (
        write_model(folder / name, config)
        for name, config in {
            "bf16": bf16_config(HEAD_DIM_128),
            "resq": quantized,
            "mixed": per_layer,
            "bf16-64": bf16_config(bundled_shape()),
            "resq-64": resq_config(bundled_shape()),
            "bf16-96": bf16_config(shape_96),
            "resq-96": resq_config(shape_96),
            "bf16-window": bf16_config(HEAD_DIM_128) | window,
            "resq-window": quantized | window,
        }.items()
    )
    engines: list[tuple[Path, dict[str, Any]]] = [
        (bf16, {}),
        (resq, {}),
        (small, {}),
        (small_resq, {}),
        (of_96, {}),
        (resq_96, {}),
        (windowed, {}),
        (resq_windowed, {}),
        (resq, {"kv_cache_dtype": "fp8"}),
        (resq, {"kv_cache_dtype_skip_layers": ["0"]}),
        (mixed, {}),
        (resq, {"block_size": 32}),
        (resq, {"enforce_eager": True}),
    ]
    return dict(zip(NAMES, decisions(engines), strict=True))


@pytest.mark.parametrize("name", ["resq", "resq-64", "resq-96", "resq-window"])
def test_our_method_and_backend_are_picked(decided: dict[str, dict[str, Any]], name: str) -> None:
    answer = decided[name]
    assert answer["platform"] == "cuda"
    assert answer["linear_methods"] == ["ResQLinearMethod"]
    assert set(answer["backends"]) == {"RESQ"}
    # vLLM's CUDA platform and both its runners honour the layout that the pages need.
    assert answer["layout"] == "LBHNC"
    assert answer["block_size"] == 64


@pytest.mark.parametrize(
    ("name", "ratio"), [("resq", 3.25), ("resq-64", 3.0), ("resq-96", 3.09), ("resq-window", 3.25)]
)
def test_tokens_of_the_cache_against_bf16(decided: dict[str, dict[str, Any]], name: str, ratio: float) -> None:
    """By vLLM's own accounting: 156 bytes a token and head instead of 512 at head_dim 128, 124 of 384, 84 of 256."""
    plain = decided[name.replace("resq", "bf16")]
    assert set(plain["backends"]) == {"FLASH_ATTN"}
    assert decided[name]["kv_tokens"] >= ratio * plain["kv_tokens"]
    blocks = decided[name]["num_gpu_blocks"] * decided[name]["block_size"]
    assert blocks >= ratio * plain["num_gpu_blocks"] * plain["block_size"]


def test_decodes_run_in_full_cuda_graphs(decided: dict[str, dict[str, Any]]) -> None:
    assert decided["resq"]["graphs"] == {"mode": "FULL_AND_PIECEWISE", "support": ["UNIFORM_BATCH"]}
    assert decided["eager"]["graphs"]["mode"] == "NONE"
    assert decided["resq"]["runner"] == 2


def test_the_compiler_pass_is_handed_in_where_the_model_is_compiled(decided: dict[str, dict[str, Any]]) -> None:
    assert decided["resq"]["passes"] == ["FuseQuantization"]
    assert decided["resq"]["fusion"] == "fused into quantization where the compiled graph shows them"
    assert decided["eager"]["passes"] == []
    assert decided["eager"]["fusion"] == "not fused into quantization, since torch.compile is off"
    assert decided["bf16"]["passes"] == []


def test_explicit_cache_dtype_leaves_the_cache_to_vllm(decided: dict[str, dict[str, Any]]) -> None:
    assert set(decided["fp8-kv"]["backends"]) == {"FLASH_ATTN"}
    assert decided["fp8-kv"]["linear_methods"] == ["ResQLinearMethod"]


def test_layers_of_several_precisions_share_one_layout(decided: dict[str, dict[str, Any]]) -> None:
    assert decided["skip"]["backends"] == ["FLASH_ATTN"] + ["RESQ"] * (LAYERS - 1)
    assert decided["mixed"]["backends"] == ["FLASH_ATTN"] + ["RESQ"] * (LAYERS - 1)
    for name in ("skip", "mixed"):
        assert decided[name]["layout"] == "LBHNC"
        assert decided[name]["kv_tokens"] > decided["bf16"]["kv_tokens"]


def test_block_size_of_the_user_is_kept(decided: dict[str, dict[str, Any]]) -> None:
    assert decided["block-32"]["block_size"] == 32
    assert set(decided["block-32"]["backends"]) == {"RESQ"}


def test_older_chip_and_v1_runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    model = write_model(tmp_path / "resq", resq_config(bundled_shape()))
    engine: list[tuple[Path, dict[str, Any]]] = [(model, {"dtype": "float16"})]
    (ampere,) = decisions(engine, (8, 0))
    assert (ampere["runner"], set(ampere["backends"]), ampere["layout"]) == (1, {"RESQ"}, "LBHNC")
    (turing,) = decisions(engine, (7, 5))
    assert "Minimum capability: 80. Current capability: 75" in turing["refused"]
