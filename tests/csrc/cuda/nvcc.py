"""When tests that look at compiled CUDA kernels may be skipped: never in CI, which sets RESQ_REQUIRE_NVCC=1 (.ci/run).

Required and absent, nvcc and cuobjdump make these tests fail: cuda_build and cuda_report say what is missing.
"""

from __future__ import annotations

import os

import pytest

from tools import cuda_build, cuda_report

REQUIRED = os.environ.get("RESQ_REQUIRE_NVCC") == "1"
needs_nvcc = pytest.mark.skipif(cuda_build.find_nvcc() is None and not REQUIRED, reason="nvcc is not here")
needs_cuobjdump = pytest.mark.skipif(
    cuda_report.cuobjdump() is None and not REQUIRED, reason="neither Triton's wheel nor a toolkit brings cuobjdump"
)
