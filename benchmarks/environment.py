"""Environment variables under which the benchmarks, the demo and the tests run vLLM."""

from __future__ import annotations

import os
from collections.abc import Mapping

LOOPBACK = "127.0.0.1,localhost"
# vLLM's "auto" keeps a core free per rank; up to this many cores that costs more than it helps.
FEW_CORES = 4


def cpu_binding(ranks: int = 1) -> str:
    """Value of VLLM_CPU_OMP_THREADS_BIND for `ranks` tensor-parallel processes on this machine.

    On a machine with few cores every core computes ("0,1" for one rank, "0|1" for two); on others vLLM decides.
    """
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) > FEW_CORES or len(cores) < ranks:
        return "auto"
    share = len(cores) // ranks
    groups = [cores[rank * share : (rank + 1) * share] for rank in range(ranks)]
    return "|".join(",".join(str(core) for core in group) for group in groups)


def vllm_environment(extra: Mapping[str, str] | None = None, ranks: int = 1) -> dict[str, str]:
    """A copy of this process's environment made fit for vLLM, with `extra` on top.

    No usage statistics; no proxy for the loopback interface; cores as `cpu_binding(ranks)` says unless
    VLLM_CPU_OMP_THREADS_BIND is set already.
    """
    environment = dict(os.environ)
    environment["VLLM_NO_USAGE_STATS"] = "1"
    environment["DO_NOT_TRACK"] = "1"
    for name in ("no_proxy", "NO_PROXY"):
        present = environment.get(name, "")
        environment[name] = f"{present},{LOOPBACK}" if present else LOOPBACK
    environment.setdefault("VLLM_CPU_OMP_THREADS_BIND", cpu_binding(ranks))
    environment.update(extra or {})
    return environment
