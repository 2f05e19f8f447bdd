"""The process in which kernels are timed: the same OpenMP runtime, binding and allocator as vLLM gives its CPU worker.

Those are fixed when a process starts, so a benchmark of kernels starts itself anew with the right environment.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from benchmarks.machine import CORES_VARIABLE, usable_cores

# Says that a process is the second one; its value is the number of threads.
MARK = "RESQ_BENCHMARK_THREADS"


def _package_folder(name: str) -> Path | None:
    found = importlib.util.find_spec(name)
    places = None if found is None else found.submodule_search_locations
    return Path(next(iter(places))) if places else None


def preloads() -> list[str]:
    """Libraries that vLLM's CPU platform preloads: tcmalloc where its wheel brings one, and torch's own libgomp."""
    wanted = (("vllm", "libs/libtcmalloc*.so*"), ("torch", "lib/libgomp*.so*"))
    libraries = []
    for package, pattern in wanted:
        folder = _package_folder(package)
        libraries += [] if folder is None else [str(path) for path in sorted(folder.glob(pattern))[:1]]
    return libraries


def kernel_environment(threads: int, base: Mapping[str, str]) -> dict[str, str]:
    """`base`, OpenMP bound to the first `threads` usable cores and vLLM's preloads (a LD_PRELOAD that is set stays)."""
    environment = dict(base)
    environment.setdefault("LD_PRELOAD", ":".join(preloads()))
    cores = usable_cores()
    environment["OMP_NUM_THREADS"] = str(threads)
    # libgomp binds the main thread to the first of them when it is loaded: the others must be remembered.
    environment["GOMP_CPU_AFFINITY"] = " ".join(str(core) for core in cores[:threads])
    environment[CORES_VARIABLE] = " ".join(str(core) for core in cores)
    environment["VLLM_NO_USAGE_STATS"] = environment["DO_NOT_TRACK"] = "1"
    # vLLM's chatter about platforms would stand between the rows.
    environment.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    environment[MARK] = str(threads)
    return environment


def restart(threads: int) -> None:
    """Replace this process by one with `kernel_environment(threads)`; returns at once in the second process.

    Raises:
        ValueError: for a number of threads that the machine has no cores for.
    """
    if os.environ.get(MARK) == str(threads):
        return
    cores = len(usable_cores())
    if not 1 <= threads <= cores:
        raise ValueError(f"--threads is {threads}, but there are {cores} usable cores: 1 to {cores} can be measured.")
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], kernel_environment(threads, os.environ))
