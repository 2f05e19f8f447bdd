"""Benchmarks on a CPU with AMX as on one without: the class that most AVX512-VNNI machines are of (Ice Lake, Zen 4)."""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "without_amx"
HELP = "Nobody uses AMX: neither oneDNN, nor vLLM's kernels, nor ours."


def hide_amx(environment: MutableMapping[str, str] = os.environ) -> None:
    """Keep every contender of this process's children from AMX: oneDNN and ours by their switches, vLLM by a patch.

    A RESQ_ISA that is set already stays. llama.cpp decides when it is compiled (docs/performance.md).
    """
    environment["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE_BF16"
    environment.setdefault("RESQ_ISA", "avx512_vnni")
    paths = environment.get("PYTHONPATH", "").split(os.pathsep)
    if str(FOLDER) not in paths:
        environment["PYTHONPATH"] = os.pathsep.join([str(FOLDER), *filter(None, paths)])
