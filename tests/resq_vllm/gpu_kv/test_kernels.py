"""The GPU cache kernels without a GPU: by Triton's interpreter, and compiled for GPUs.

Triton chooses between interpreter and compiler when a kernel is defined, for the whole process, and vLLM's imports
define kernels. So the checks run in child processes, which alone have the environment variable.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def run_checks(file: str, **environment: str) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(HERE / file)]
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    # One thread: the interpreter multiplies small numpy matrices.
    child = subprocess.run(
        command,
        env={**inherited, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", **environment},
        cwd=HERE.parents[2],
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert child.returncode == 0, child.stdout[-8000:] + child.stderr[-2000:]
    assert " passed" in child.stdout


@pytest.mark.parametrize("file", ["checks_write.py", "checks_attention.py", "checks_cuda_decode.py"])
def test_interpreted_kernels_equal_the_reference(file: str) -> None:
    run_checks(file, TRITON_INTERPRET="1")


@pytest.mark.parametrize("chip", [80, 90])
def test_kernels_compile_for_gpus(chip: int) -> None:
    run_checks("checks_compiled.py", RESQ_TEST_CHIP=str(chip))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("file", ["checks_write.py", "checks_attention.py", "checks_graph.py"])
@pytest.mark.parametrize("cuda_kernel", ["1", "0"])
def test_kernels_on_a_gpu_equal_the_reference(file: str, cuda_kernel: str) -> None:
    run_checks(file, RESQ_TEST_DEVICE="cuda", RESQ_CUDA_ATTENTION=cuda_kernel)
