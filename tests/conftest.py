"""Every test runs without usage statistics, without proxies for the loopback interface, with reproducible examples."""

from __future__ import annotations

import os

from hypothesis import settings

from benchmarks.environment import vllm_environment

# A shared machine stalls now and then: time limits per example would fail for no fault of the code.
settings.register_profile("resq", deadline=None, derandomize=True)
settings.load_profile("resq")

os.environ.update(vllm_environment())
