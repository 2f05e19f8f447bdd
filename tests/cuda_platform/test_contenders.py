"""Every contender of benchmarks.gpu_serve is accepted by vLLM's CUDA platform, and is what its name says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.dummy_model import SHAPES
from benchmarks.gpu_serve_contenders import CAPTURE_SIZES, CONTENDERS, model_folder
from tests.cuda_platform.support import decisions

# TurboQuant leaves the first and the last two layers in bf16.
LAYERS = 5
BF16_METHOD = "UnquantizedLinearMethod"


@pytest.fixture(scope="module")
def decided(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("models")
    patch = pytest.MonkeyPatch()
    patch.setitem(SHAPES, "few", replace(SHAPES["8b"], num_hidden_layers=LAYERS))
    shared = {"max_model_len": 4224, "max_num_seqs": 256, "cudagraph_capture_sizes": list(CAPTURE_SIZES)}
    engines = [(model_folder(folder, "few", c, 4224), c.options | shared) for c in CONTENDERS.values()]
    patch.undo()
    return dict(zip(CONTENDERS, decisions(engines), strict=True))


@pytest.mark.parametrize("name", CONTENDERS)
def test_contender_is_accepted(decided: dict[str, dict[str, Any]], name: str) -> None:
    assert "refused" not in decided[name]
    assert decided[name]["graphs"]["mode"] == "FULL_AND_PIECEWISE"
    assert decided[name]["capture_sizes"] == list(CAPTURE_SIZES)


@pytest.mark.parametrize(
    ("name", "method", "backend"),
    [
        ("bf16", BF16_METHOD, "FLASH_ATTN"),
        ("resq", "ResQLinearMethod", "RESQ"),
        ("resq-kv", BF16_METHOD, "RESQ"),
        ("resq-weights", "ResQLinearMethod", "FLASH_ATTN"),
        ("fp8-w8a8", "Fp8PerTensorOnlineLinearMethod", "FLASH_ATTN"),
        ("w4a16", "AutoGPTQLinearMethod", "FLASH_ATTN"),
        ("int4-kv", BF16_METHOD, "TRITON_ATTN"),
        ("turboquant-kv", BF16_METHOD, "TURBOQUANT"),
    ],
)
def test_contender_runs_what_it_is_named_for(
    decided: dict[str, dict[str, Any]], name: str, method: str, backend: str
) -> None:
    answer = decided[name]
    assert answer["linear_methods"] == [method]
    assert answer["backends"][LAYERS // 2] == backend


def test_tokens_of_the_caches(decided: dict[str, dict[str, Any]]) -> None:
    """Bytes a token and head: bf16 512, ours 156, int4_per_token_head 136."""
    tokens = {name: answer["kv_tokens"] for name, answer in decided.items()}
    assert tokens["int4-kv"] > tokens["resq"] == tokens["resq-kv"] >= 3.1 * tokens["bf16"]
    assert tokens["bf16"] == tokens["resq-weights"] == tokens["fp8-w8a8"] == tokens["w4a16"]
