"""A quantized bundled model and the servers that the tests share: one engine start per configuration."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.environment import cpu_binding
from benchmarks.server import VLLMServer
from offline.bundled import HELDOUT_TEXT, MODEL_DIR

KV_CACHE_BYTES = 32 << 20
# Small blocks, so that short prompts fill some; eager, since compiling takes longer than all the questions.
FLAGS = (
    "--enforce-eager",
    "--max-model-len=512",
    "--max-num-seqs=16",
    "--block-size=32",
    f"--kv-cache-memory-bytes={KV_CACHE_BYTES}",
    "--enable-prompt-tokens-details",
)
START_SECONDS = 300.0


@pytest.fixture(scope="session")
def quantized_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model, quantized through the command line."""
    folder = tmp_path_factory.mktemp("checkpoint") / "resq"
    command = [sys.executable, "-m", "offline.cli", "quantize", str(MODEL_DIR), "-o", str(folder)]
    options = ["--nsamples", "16", "--seqlen", "256", "--eval-windows", "0"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def _serve(checkpoint: Path, folder: Path, name: str, *flags: str, ranks: int = 1) -> VLLMServer:
    # Named here, since the tests' own environment already binds threads for one rank.
    threads = {"VLLM_CPU_OMP_THREADS_BIND": cpu_binding(ranks)}
    return VLLMServer(checkpoint, *FLAGS, *flags, log=folder / f"{name}.log", env=threads, timeout=START_SECONDS)


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="session")
def server(quantized_checkpoint: Path, logs: Path) -> Iterator[VLLMServer]:
    """`vllm serve CHECKPOINT`: the method comes from config.json."""
    with _serve(quantized_checkpoint, logs, "plain") as running:
        yield running


@pytest.fixture(scope="session")
def bf16_cache_server(quantized_checkpoint: Path, logs: Path) -> Iterator[VLLMServer]:
    """The same checkpoint with vLLM's own cache."""
    with _serve(quantized_checkpoint, logs, "bf16", "--kv-cache-dtype=bfloat16") as running:
        yield running


@pytest.fixture(scope="session")
def two_rank_server(quantized_checkpoint: Path, logs: Path) -> Iterator[VLLMServer]:
    """Two tensor-parallel ranks, the method named explicitly."""
    flags = ("--quantization=resq", "--tensor-parallel-size=2")
    with _serve(quantized_checkpoint, logs, "tp2", *flags, ranks=2) as running:
        yield running


@pytest.fixture(scope="session")
def prompts() -> list[str]:
    """Eight pieces of held-out text, of different lengths."""
    text = HELDOUT_TEXT.read_text(encoding="utf-8")
    return [text[2000 * i : 2000 * i + 150 + 40 * i] for i in range(8)]
