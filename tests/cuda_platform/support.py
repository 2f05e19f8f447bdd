"""Asks tests.cuda_platform.child, a process that vLLM's CUDA platform is faked in."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.environment import vllm_environment


def decisions(engines: list[tuple[Path, dict[str, Any]]], capability: tuple[int, int] = (9, 0)) -> list[dict[str, Any]]:
    """What the CUDA platform decides for each (model folder, EngineArgs)."""
    given = {"capability": capability, "engines": [{"model": str(m), "options": o} for m, o in engines]}
    command = [sys.executable, "-m", "tests.cuda_platform.child", json.dumps(given)]
    environment = vllm_environment({"OMP_NUM_THREADS": "1"})
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    answers: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return answers
