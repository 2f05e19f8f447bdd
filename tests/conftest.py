"""Every test runs without usage statistics, without proxies for the loopback interface, with reproducible examples."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

from benchmarks.environment import vllm_environment

# A shared machine stalls now and then: time limits per example would fail for no fault of the code.
settings.register_profile("resq", deadline=None, derandomize=True)
settings.load_profile("resq")

os.environ.update(vllm_environment())
if "PYTEST_XDIST_WORKER" in os.environ:
    # Two processes with two threads each on two cores mostly wait for each other's threads: resq quantize took more
    # than six minutes instead of two. vLLM's engines have as many as VLLM_CPU_OMP_THREADS_BIND says.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

TESTS = Path(__file__).parent
# The longest first: what is left at the end is short.
BEGIN = ("serving", "offline/test_quality.py")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With several workers (-n 2 --dist loadgroup), a file's tests stay on one, and so do all that share servers."""
    if not config.pluginmanager.hasplugin("xdist"):
        return
    groups = {}
    for item in items:
        file = item.path.relative_to(TESTS)
        groups[item] = file.parts[0] if file.parts[0] == "serving" else file.as_posix()
        item.add_marker(pytest.mark.xdist_group(groups[item]))
    items.sort(key=lambda item: BEGIN.index(groups[item]) if groups[item] in BEGIN else len(BEGIN))
