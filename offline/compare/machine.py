"""The facts about machine and software that go with measured figures."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

from pydantic import JsonValue

_CPUINFO = Path("/proc/cpuinfo")
_PACKAGES = ("torch", "transformers", "lm_eval")


def machine() -> dict[str, JsonValue]:
    """Processor, cores this process may use, operating system, Python and package versions."""
    packages: dict[str, JsonValue] = {}
    for name in _PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "processor": processor(_CPUINFO.read_text(errors="replace") if _CPUINFO.exists() else ""),
        "cores": len(os.sched_getaffinity(0)),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": packages,
    }


def processor(cpuinfo: str) -> str:
    """Model name from the text of /proc/cpuinfo, or what the platform module knows without one."""
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name" and value.strip():
            return value.strip()
    return platform.processor() or platform.machine()
