"""`vllm bench throughput --load-format dummy`: speed can be measured without weights, compiled as users run it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.environment import vllm_environment

pytestmark = pytest.mark.serving


def test_throughput_with_dummy_weights(quantized_checkpoint: Path, tmp_path: Path) -> None:
    answer = tmp_path / "throughput.json"
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "throughput"]
    options = {
        "model": quantized_checkpoint,
        "load-format": "dummy",
        "dataset-name": "random",
        "random-input-len": 64,
        "random-output-len": 16,
        "num-prompts": 4,
        "max-model-len": 128,
        "kv-cache-memory-bytes": 16 << 20,
        "output-json": answer,
    }
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    done = subprocess.run(
        [*command, *flags], env=vllm_environment(), capture_output=True, text=True, timeout=480, check=False
    )
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-3000:]
    assert "load_format=dummy" in log
    assert "quantization=resq" in log
    assert "ResQ: CPU kernels" in log
    result = json.loads(answer.read_text())
    assert result["tokens_per_second"] > 0
