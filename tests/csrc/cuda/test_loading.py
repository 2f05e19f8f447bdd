"""The built CUDA library loads beside an empty libtorch_cuda, registers its ops and says what it was built for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from resq_vllm.cuda import Machine, problem
from tests.csrc.cuda.nvcc import needs_nvcc
from tools import cuda_build

pytestmark = [
    needs_nvcc,
    pytest.mark.skipif(torch.version.cuda is not None, reason="an empty libtorch_cuda.so takes the place of PyTorch's"),
]
PROBE = """
import ctypes, importlib.util, os, sys, torch
from resq_vllm import ops
ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
sys.setdlopenflags(os.RTLD_LAZY)  # the empty library lacks the functions that are called
spec = importlib.util.spec_from_file_location("resq_vllm._C_cuda", sys.argv[2])
module = importlib.util.module_from_spec(spec)
from resq_vllm import fused
for name in ("quantize_pack", "rms_norm_quantize", "silu_mul_quantize", "quantize_activation", "hadamard"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"resq::{name}", "CUDA"), name
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"resq::{name}", "CPU"), name
print(module.archs, module.runtime_version, module.driver_version(), sep="|")
"""


def test_it_registers_its_ops_and_says_what_was_built(tmp_path: Path) -> None:
    library = tmp_path / "_C_cuda.abi3.so"
    torch_folder = Path(torch.__file__).parent
    cuda_build.build(library, torch_folder)
    stub = cuda_build.stub_folder(torch_folder)[0] / "libtorch_cuda.so"
    command = [sys.executable, "-c", PROBE, str(stub), str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cuda_build.ROOT)
    assert done.returncode == 0, done.stderr
    archs, runtime, driver = done.stdout.strip().split("|")
    assert archs == " ".join(cuda_build.chosen_archs())
    assert int(runtime) >= 12000
    assert driver == "0", "no driver here"
    said = problem(Machine("H200", (9, 0), 0), archs.split(), int(runtime))
    assert said is not None
    assert "update the driver" in said
