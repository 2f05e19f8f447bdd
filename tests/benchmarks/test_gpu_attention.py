"""benchmarks.gpu_attention without a GPU: the refusal, the cases, and the arithmetic of its figures."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from benchmarks import gpu_attention_contenders as contenders_module
from benchmarks.gpu_attention import BATCHES, CONTEXTS, Measured, cases, rows_of, table
from benchmarks.gpu_attention_contenders import (
    LLAMA_1B,
    LLAMA_8B,
    Case,
    Heads,
    UnavailableError,
    contenders,
    flash,
    slots,
)
from benchmarks.pairs import Comparison

HERE = Path(__file__).parent


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_sentence_and_code_2() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_attention"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "needs an NVIDIA GPU" in done.stderr


def test_cases_are_decodes_and_a_prompts_last_chunk() -> None:
    found = cases(BATCHES, CONTEXTS)
    assert Case("decode", 64, 32768, 1) in found
    assert Case("prefill", 1, 4096, 4096) in found
    assert Case("prefill", 1, 32768, 8192) in found
    assert not any(case.sequences == 256 and case.context == 32768 for case in cases([256], CONTEXTS))


def test_bytes_are_those_of_the_caches() -> None:
    bytes_of = {name: entry.bytes_per_token(LLAMA_8B) for name, entry in contenders().items()}
    assert bytes_of == {"bf16": 512, "fp8": 256, "resq": 156, "resq-triton": 156, "resq-8bit": 268}
    assert contenders()["resq"].bytes_per_token(LLAMA_1B) == 84


def test_work_counts_the_scores_below_the_diagonal() -> None:
    assert Case("prefill", 1, 3, 3).work(LLAMA_8B) == 4 * 32 * 128 * (1 + 2 + 3)
    assert Case("prefill", 1, 10, 2).work(LLAMA_8B) == 4 * 32 * 128 * (9 + 10)
    assert Case("decode", 5, 10, 1).work(LLAMA_8B) == 5 * 4 * 32 * 128 * 10


def test_rows_and_table() -> None:
    layer = Comparison("bf16", {"bf16": [5e3, 5e3], "resq": [5e3, 15e3]})
    attention = Comparison("bf16", {"bf16": [1e4, 1e4], "resq": [2e4, 4e4]})
    rows = rows_of(Case("decode", 16, 1024, 1), LLAMA_8B, Measured(layer, attention))
    assert [row["layer_ratio_to_bf16"] for row in rows] == [1.0, 2.0]
    assert [row["attention_ratio_to_bf16"] for row in rows] == [1.0, 3.0]
    assert (rows[0]["layer_us"], rows[0]["attention_us"]) == (200.0, 100.0)
    assert [row["layer_quartiles_us"] for row in rows] == [[200.0, 200.0], [80.0, 133.3]]
    assert [row["attention_quartiles_us"] for row in rows] == [[100.0, 100.0], [28.57, 40.0]]
    assert rows[0]["kv_gb_s"] == pytest.approx(16 * 1024 * 8 * 512 / 1e-4 / 1e9, rel=1e-3)
    assert table(rows).row_count == 2


def test_new_tokens_are_the_last_of_their_sequences() -> None:
    pages = torch.tensor([[7, 2, 5], [1, 0, 4]], dtype=torch.int32)
    found = slots(Case("prefill", 2, 130, 3), pages)
    assert found.dtype == torch.int64
    assert found.tolist() == [2 * 64 + 63, 5 * 64, 5 * 64 + 1, 0 * 64 + 63, 4 * 64, 4 * 64 + 1]


def run_checks(**variables: str) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(HERE / "checks_gpu_attention.py")]
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment = {**inherited, "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, cwd=HERE.parents[1], timeout=600
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "2 passed" in done.stdout


def test_our_layer_equals_the_reference() -> None:
    run_checks(TRITON_INTERPRET="1")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_our_layer_on_a_gpu_equals_the_reference() -> None:
    run_checks(RESQ_TEST_DEVICE="cuda")


class FlashAttention:
    """In place of vLLM's GPU modules: what they are called with, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, version: int) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.metadata = torch.zeros(1)
        ops, utils, kernels = (ModuleType(name) for name in ("_custom_ops", "fa_utils", "vllm_flash_attn"))
        ops.reshape_and_cache_flash = self.write  # type: ignore[attr-defined]
        ops.scaled_fp8_quant = self.quantize  # type: ignore[attr-defined]
        utils.get_flash_attn_version = lambda head_size: version  # type: ignore[attr-defined]
        kernels.flash_attn_varlen_func = lambda **given: self.calls.append(("attention", given))  # type: ignore[attr-defined]
        kernels.get_scheduler_metadata = self.schedule  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "vllm._custom_ops", ops)
        monkeypatch.setitem(sys.modules, "vllm.v1.attention.backends.fa_utils", utils)
        monkeypatch.setitem(sys.modules, "vllm.vllm_flash_attn", kernels)
        monkeypatch.setattr(contenders_module, "DEVICE", "cpu")
        monkeypatch.setattr(contenders_module, "POOL_BYTES", 1)

    def write(self, key: Any, value: Any, keys: Any, values: Any, where: Any, dtype: str, *scales: Any) -> None:
        self.calls.append(("write", {"keys": keys, "values": values, "where": where, "dtype": dtype}))

    def quantize(self, given: torch.Tensor, scale: torch.Tensor, output: torch.Tensor) -> None:
        self.calls.append(("quantize", {"output": output}))

    def schedule(self, **given: Any) -> torch.Tensor:
        self.calls.append(("schedule", given))
        return self.metadata


SMALL = Heads("small", 8, 2, 64)


@pytest.mark.parametrize(("queries", "splits"), [(1, 32), (40, 0)])
def test_flash_attention_is_scheduled_once_and_written_before(
    monkeypatch: pytest.MonkeyPatch, queries: int, splits: int
) -> None:
    vllm = FlashAttention(monkeypatch, 3)
    case = Case("decode", 2, 100, queries)
    calls = flash(case, SMALL, fp8=False)
    ((name, schedule),) = vllm.calls
    assert name == "schedule"
    assert (schedule["max_seqlen_q"], schedule["page_size"], schedule["num_splits"]) == (queries, 64, splits)
    assert schedule["qkv_dtype"] == torch.bfloat16
    calls.layer[0]()
    calls.layer[0]()
    assert [name for name, _ in vllm.calls[1:]] == ["write", "attention"] * 2
    write, attention = vllm.calls[1][1], vllm.calls[2][1]
    assert write["keys"] is attention["k"]
    assert write["values"] is attention["v"]
    assert write["dtype"] == "auto"
    assert torch.equal(write["where"], slots(case, attention["block_table"]))
    assert attention["scheduler_metadata"] is vllm.metadata
    assert attention["num_splits"] == splits
    calls.attention[0]()
    assert [name for name, _ in vllm.calls[5:]] == ["attention"]


def test_fp8_layer_quantizes_its_query_into_what_is_attended(monkeypatch: pytest.MonkeyPatch) -> None:
    vllm = FlashAttention(monkeypatch, 3)
    calls = flash(Case("decode", 2, 100, 1), SMALL, fp8=True)
    assert vllm.calls[0][1]["qkv_dtype"] == torch.float8_e4m3fn
    calls.layer[0]()
    assert [name for name, _ in vllm.calls[1:]] == ["write", "quantize", "attention"]
    write, quantize, attention = (given for _, given in vllm.calls[1:])
    assert write["dtype"] == "fp8"
    assert write["keys"].data_ptr() == attention["k"].data_ptr()
    assert attention["k"].dtype == attention["q"].dtype == torch.float8_e4m3fn
    assert quantize["output"].data_ptr() == attention["q"].data_ptr()
    assert attention["k_descale"].shape == (2, SMALL.kv)


def test_older_flash_attention_has_no_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    vllm = FlashAttention(monkeypatch, 2)
    flash(Case("decode", 2, 100, 1), SMALL, fp8=False).layer[0]()
    assert [name for name, _ in vllm.calls] == ["write", "attention"]
    assert not {"scheduler_metadata", "num_splits"} & set(vllm.calls[1][1])
    with pytest.raises(UnavailableError, match="vLLM chose version 2 here"):
        flash(Case("decode", 2, 100, 1), SMALL, fp8=True)
