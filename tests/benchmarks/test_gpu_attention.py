"""benchmarks.gpu_attention without a GPU: the refusal, the cases, and the arithmetic of its figures."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from benchmarks.gpu_attention import BATCHES, CONTEXTS, cases, rows_of, table
from benchmarks.gpu_attention_contenders import LLAMA_1B, LLAMA_8B, Case, contenders
from benchmarks.pairs import Comparison


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
    assert bytes_of == {"bf16": 512, "fp8": 256, "resq": 156, "resq-8bit": 268}
    assert contenders()["resq"].bytes_per_token(LLAMA_1B) == 84


def test_work_counts_the_scores_below_the_diagonal() -> None:
    assert Case("prefill", 1, 3, 3).work(LLAMA_8B) == 4 * 32 * 128 * (1 + 2 + 3)
    assert Case("prefill", 1, 10, 2).work(LLAMA_8B) == 4 * 32 * 128 * (9 + 10)
    assert Case("decode", 5, 10, 1).work(LLAMA_8B) == 5 * 4 * 32 * 128 * 10


def test_rows_and_table() -> None:
    measured = Comparison("bf16", {"bf16": [1e4, 1e4], "resq": [2e4, 3e4]})
    rows = rows_of(Case("decode", 16, 1024, 1), LLAMA_8B, measured)
    assert [row["ratio_to_bf16"] for row in rows] == [1.0, 2.5]
    assert rows[0]["kv_gb_s"] == pytest.approx(16 * 1024 * 8 * 512 / 1e-4 / 1e9, rel=1e-3)
    assert table(rows).row_count == 2
