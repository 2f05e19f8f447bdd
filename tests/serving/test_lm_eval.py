"""`lm_eval --model vllm` on a quantized checkpoint, as a user would run it, and the reference model beside it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.environment import vllm_environment
from offline.evaluate.reference_model import load_reference_model
from offline.evaluate.tasks import load_tasks
from offline.models.tokenizer import load_tokenizer

pytestmark = pytest.mark.serving

TASKS = Path(__file__).resolve().parents[1] / "offline" / "evaluate" / "data"


def test_lm_eval_runs_unchanged_and_agrees_with_the_reference(quantized_checkpoint: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lm_eval", "--model", "vllm", "--model_args", f"pretrained={quantized_checkpoint}"]
    flags = ["--tasks", "python_lines", "--include_path", str(TASKS), "--output_path", str(tmp_path), "--log_samples"]
    # On a CPU vLLM wants 92 % of the machine's memory for its cache, and does not start when others hold the rest.
    environment = vllm_environment({"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"})
    done = subprocess.run(
        [*command, *flags], cwd=TASKS, env=environment, capture_output=True, text=True, timeout=480, check=False
    )
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-3000:]
    assert "quantization=resq" in log
    assert "ResQ: CPU kernels" in log
    (file,) = tmp_path.rglob("results_*.json")
    served = json.loads(file.read_text())["results"]["python_lines"]["acc_norm,none"]
    (file,) = tmp_path.rglob("samples_*.jsonl")
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    reference = load_tasks([str(TASKS / "python_lines.yaml")]).run(
        load_reference_model(quantized_checkpoint), load_tokenizer(quantized_checkpoint)
    )["python_lines"]
    assert len(samples) == 24
    assert reference >= 0.8
    # One of 24 answers may tip over: vLLM computes in bf16, the reference in float32.
    assert served == pytest.approx(reference, abs=0.05)
