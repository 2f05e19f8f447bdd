"""The environment of the process in which kernels are timed."""

from __future__ import annotations

import os
import sys

import pytest

from benchmarks import kernel_process
from benchmarks.kernel_process import MARK, kernel_environment, preloads, restart
from benchmarks.machine import CORES_VARIABLE, usable_cores


def test_threads_are_bound_to_the_first_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CORES_VARIABLE, "2 3 5")
    environment = kernel_environment(2, {"HOME": "/x"})
    assert environment["OMP_NUM_THREADS"] == "2"
    assert environment["GOMP_CPU_AFFINITY"] == "2 3"
    assert environment["HOME"] == "/x"
    # Binding takes the cores from the main thread's mask: the second process must still know of them.
    assert environment[CORES_VARIABLE] == "2 3 5"


def test_runtime_is_torchs_own_as_in_vllm() -> None:
    assert [path for path in preloads() if "libgomp" in path]
    assert all(os.path.exists(path) for path in preloads())


def test_preload_of_the_caller_stays() -> None:
    assert kernel_environment(1, {"LD_PRELOAD": "libmine.so"})["LD_PRELOAD"] == "libmine.so"


def test_second_process_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MARK, "1")
    monkeypatch.setattr(os, "execve", lambda *_: pytest.fail("started again"))
    restart(1)


def test_first_process_starts_the_same_command_again(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.delenv(MARK, raising=False)
    monkeypatch.setattr(os, "execve", lambda _, command, environment: started.append([*command, environment[MARK]]))
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "benchmarks.linear", "--rounds", "3"])
    restart(1)
    assert started == [[sys.executable, "-m", "benchmarks.linear", "--rounds", "3", "1"]]


@pytest.mark.parametrize("threads", [0, -1, 128 + len(usable_cores())])
def test_threads_that_the_machine_lacks(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    monkeypatch.delenv(MARK, raising=False)
    with pytest.raises(ValueError, match=f"--threads is {threads}, but there are"):
        kernel_process.restart(threads)
