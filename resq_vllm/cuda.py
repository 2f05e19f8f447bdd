"""The CUDA library resq_vllm/_C_cuda.abi3.so: loaded where torch has CUDA, and checked against the GPU before use.

Loading touches no device, so it is safe before vLLM forks its workers. Whether the GPU can run what was built is asked
later, by :func:`require`, where a layer's weights lie on it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch

from resq_vllm.errors import ResQError

OLDEST_CHIP = (8, 0)
_REBUILD = "reinstall resq-vllm with `pip install --no-build-isolation .` where nvcc is on PATH"


@dataclass(frozen=True)
class Machine:
    """What :func:`problem` compares. chip: compute capability; versions: 1000·major + 10·minor, as CUDA counts them."""

    name: str
    chip: tuple[int, int]
    driver: int


@cache
def load() -> tuple[ModuleType | None, str]:
    """The library's module, whose import registers the ops' CUDA implementations; or None and why it is not there."""
    if torch.version.cuda is None:
        return None, f"this PyTorch ({torch.__version__}) is built without CUDA; install one with CUDA"
    try:
        from resq_vllm import _C_cuda  # type: ignore[attr-defined]
    except ImportError as error:
        missing = "cannot import name" in str(error)
        reason = (
            "resq-vllm was built without its CUDA kernels" if missing else f"_C_cuda.abi3.so cannot be loaded ({error})"
        )
        return None, f"{reason}; {_REBUILD}"
    return _C_cuda, ""


@cache
def require(index: int) -> None:
    """Raise ResQError with one sentence when the kernels cannot run on CUDA device ``index``."""
    name = torch.cuda.get_device_name(index)
    module, reason = load()
    if module is None:
        raise ResQError(f"{name}: {reason}")
    machine = Machine(name, torch.cuda.get_device_capability(index), module.driver_version())
    found = problem(machine, module.archs.split(), module.runtime_version)
    if found:
        raise ResQError(found)


def problem(machine: Machine, archs: list[str], runtime: int) -> str | None:
    """Why a library built for ``archs`` with CUDA ``runtime`` cannot run on the machine, or None.

    archs: "sm_86" runs on every chip 8.x from 8.6 on, "sm_90a" on 9.0 alone, "compute_90" (PTX) on all from 9.0 on.
    """
    chip = f"{machine.name} (compute capability {machine.chip[0]}.{machine.chip[1]})"
    if machine.chip < OLDEST_CHIP:
        return f"{chip} has no 4-bit tensor cores that ResQ's kernels use; they need compute capability 8.0 or later"
    if not any(_runs(arch, machine.chip) for arch in archs):
        wanted = f"sm_{machine.chip[0]}{machine.chip[1]}"
        return (
            f"{chip} cannot run the CUDA kernels of this build, which has {', '.join(archs)}; {_REBUILD} and "
            f"RESQ_CUDA_ARCHS={wanted}"
        )
    if machine.driver // 1000 < runtime // 1000:
        return (
            f"{chip}: its driver supports CUDA {_version(machine.driver)}, but the kernels were built with CUDA "
            f"{_version(runtime)}; update the driver, or {_REBUILD} from CUDA {machine.driver // 1000}"
        )
    return None


def _runs(arch: str, chip: tuple[int, int]) -> bool:
    match = re.fullmatch(r"(sm|compute)_(\d+)(\d)(a?)", arch)
    assert match is not None, arch
    built = (int(match[2]), int(match[3]))
    if match[4]:
        return built == chip
    return built <= chip if match[1] == "compute" else built[0] == chip[0] and built <= chip


def _version(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"
