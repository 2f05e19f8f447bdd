"""Every test runs without usage statistics, without proxies for the loopback interface, with reproducible examples."""

from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import settings

from benchmarks.environment import vllm_environment

# A shared machine stalls now and then: time limits per example would fail for no fault of the code.
settings.register_profile("resq", deadline=None, derandomize=True)
settings.load_profile("resq")

os.environ.update(vllm_environment())
SHARED = "PYTEST_XDIST_WORKER" in os.environ
if SHARED:
    # Two processes with two threads each on two cores mostly wait for each other's threads: resq quantize took more
    # than six minutes instead of two. vLLM's engines have as many as VLLM_CPU_OMP_THREADS_BIND says.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# The longest first: what is left at the end is short.
BEGIN = ("tests/serving", "tests/offline/test_quality.py")


def scope(nodeid: str) -> str:
    """What stays in one process: a file's tests, and all that share servers; checks of kernels are each alone."""
    file = nodeid.partition("::")[0]
    if os.path.basename(file).startswith("checks_"):
        return nodeid
    return BEGIN[0] if file.startswith(BEGIN[0] + "/") else file


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if SHARED:
        items.sort(key=lambda item: (*BEGIN, scope(item.nodeid)).index(scope(item.nodeid)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With several processes (-n 2): scopes as above."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduler(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return scope(nodeid)

    return Scheduler(config, log)
