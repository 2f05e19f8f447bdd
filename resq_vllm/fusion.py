"""Norms and activations in the linear layers that read them: resq_vllm.fusion_cpu and resq_vllm.fusion_gpu."""

from __future__ import annotations

import os

# "0" leaves vLLM's graphs alone, for measurements.
SWITCH = "RESQ_FUSE"


def switched_off() -> bool:
    """Whether the environment says so."""
    return os.environ.get(SWITCH) == "0"
