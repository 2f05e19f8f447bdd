"""The CUDA library resq_vllm/_C_cuda.abi3.so: loaded where torch has CUDA, and checked against the GPU before use.

Loading touches no device, so it is safe before vLLM forks its workers. Whether the GPU can run what was built is asked
later, by :func:`require`, where a layer's weights lie on it.
"""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch

from resq_vllm.errors import ResQError
from resq_vllm.log import log_once

OLDEST_CHIP = (8, 0)
HOPPER = (9, 0)
# "1": run the kernels that this build has where a build for the chip would have faster ones.
ALLOW_SLOW = "RESQ_ALLOW_SLOW_KERNELS"
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
    archs = module.archs.split()
    found = problem(machine, archs, module.runtime_version, os.environ.get(ALLOW_SLOW) == "1")
    if found:
        raise ResQError(found)
    said = note(machine, archs)
    if said:
        log_once(logging.WARNING if slower(machine.chip, archs) else logging.INFO, f"ResQ: {said}")


def problem(machine: Machine, archs: list[str], runtime: int, allow_slow: bool = False) -> str | None:
    """Why a library built for ``archs`` with CUDA ``runtime`` is not to run on the machine, or None.

    archs: "sm_86" runs on every chip 8.x from 8.6 on, "sm_90a" on 9.0 alone, "compute_90" (PTX) on all from 9.0 on.
    allow_slow: run it also where a build for the chip would have faster kernels.
    """
    chip, built = _named(machine), ", ".join(archs)
    if machine.chip < OLDEST_CHIP:
        return f"{chip} has no 4-bit tensor cores that ResQ's kernels use; they need compute capability 8.0 or later"
    rebuild = f"{_REBUILD} and RESQ_CUDA_ARCHS={wanted(machine.chip)}"
    code = _code(machine.chip, archs)
    if code is None:
        return f"{chip} cannot run the CUDA kernels of this build, which has {built}; {rebuild}"
    if machine.driver // 1000 < runtime // 1000:
        return (
            f"{chip}: its driver supports CUDA {_version(machine.driver)}, but the kernels were built with CUDA "
            f"{_version(runtime)}; update the driver, or {_REBUILD} from CUDA {machine.driver // 1000}"
        )
    # Machine code runs on every driver of its major version; PTX only on one that knows the compiler that wrote it.
    if code.startswith("compute") and machine.driver < runtime:
        return (
            f"{chip} would have to compile this build's PTX ({code}), but its driver supports CUDA "
            f"{_version(machine.driver)} and the PTX is of CUDA {_version(runtime)}; update the driver, or {rebuild}"
        )
    lost = slower(machine.chip, archs)
    if lost and not allow_slow:
        return (
            f"{chip} would run slower kernels than it can, since this build has {built} and not the {lost}; {rebuild}, "
            f"or allow the slower ones by {ALLOW_SLOW}=1"
        )
    return None


def note(machine: Machine, archs: list[str]) -> str:
    """Which kernels run on the machine and why, where they are not those that this build made for it; else ""."""
    lost, code = slower(machine.chip, archs), _code(machine.chip, archs)
    parts = []
    if lost:
        parts.append(
            f"runs the 8-bit mma.sync kernels, not the {lost}, since this build has {', '.join(archs)} and "
            f"{ALLOW_SLOW}=1 allows it"
        )
    elif machine.chip > HOPPER:
        parts.append("runs the 8-bit mma.sync kernels, the fastest that ResQ has for it")
    if code is not None and code.startswith("compute"):
        parts.append(f"the driver compiles them from PTX ({code}) when they are first used")
    return f"{_named(machine)} {'; '.join(parts)}" if parts else ""


def wanted(chip: tuple[int, int]) -> str:
    """The architecture to build for the chip: sm_90a for Hopper, since plain sm_90 has no wgmma."""
    return "sm_90a" if chip == HOPPER else f"sm_{chip[0]}{chip[1]}"


def slower(chip: tuple[int, int], archs: list[str]) -> str:
    """The faster kernels that a build for this chip would have and this one has not, or "".

    As csrc/cuda/op_linear.cpp decides. Chips after Hopper have none of their own: PTX gives them the best there is.
    """
    if chip == HOPPER and "sm_90a" not in archs:
        return "wgmma kernels of sm_90a"
    if chip[0] == 8 and not any(arch.startswith("sm_8") for arch in archs):
        return "4-bit mma.sync kernels of sm_8x"
    return ""


def _named(machine: Machine) -> str:
    return f"{machine.name} (compute capability {machine.chip[0]}.{machine.chip[1]})"


def _code(chip: tuple[int, int], archs: list[str]) -> str | None:
    """What the chip runs of ``archs``, machine code before PTX, newer before older; None when it can run none."""
    fit = [arch for arch in archs if _runs(arch, chip)]
    return max(fit, key=lambda arch: (arch.startswith("sm_"), *_numbers(arch)), default=None)


def _runs(arch: str, chip: tuple[int, int]) -> bool:
    built = _numbers(arch)
    if arch.endswith("a"):
        return built == chip
    return built <= chip if arch.startswith("compute") else built[0] == chip[0] and built <= chip


def _numbers(arch: str) -> tuple[int, int]:
    match = re.fullmatch(r"(?:sm|compute)_(\d+)(\d)a?", arch)
    assert match is not None, arch
    return int(match[1]), int(match[2])


def _version(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"
