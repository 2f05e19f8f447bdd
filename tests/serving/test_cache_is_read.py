"""The packed cache is what attention reads: erasing it ruins the model, and leaving it alone repairs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.environment import vllm_environment

pytestmark = pytest.mark.serving


def test_erased_cache_ruins_the_output(quantized_checkpoint: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.serving.zeroed_cache", str(quantized_checkpoint)],
        env=vllm_environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert result["again"] == result["packed"]
    assert result["erased"]["nll"] > result["packed"]["nll"] + 0.5
    assert result["erased"]["text"] != result["packed"]["text"]
