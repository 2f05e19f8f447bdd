"""Triton kernels compiled for a GPU that is not there: launches with CPU tensors stop at the cubin.

Import and call :func:`compile_for` in a process of its own, before any kernel is launched.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.runtime import jit
from triton.runtime.driver import driver

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Compiled:
    """One launch. key: what Triton's own cache knows the kernel by; shared: bytes of shared memory; sass: its code."""

    name: str
    key: str
    shared: int
    registers: int
    sass: str

    @property
    def tensor_core_instructions(self) -> int:
        return len(re.findall(r"\b(HMMA|HGMMA)", self.sass))

    @property
    def spills_in_loops(self) -> int:
        """Instructions on local memory between a loop's first instruction and its branch back."""
        labels: dict[str, int] = {}
        code: list[str] = []
        spans: list[tuple[int, int]] = []
        for line in self.sass.splitlines():
            if label := re.match(r"(\.L_x_\d+):", line):
                labels[label[1]] = len(code)
            elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
                code.append(instruction[1])
                back = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", instruction[1])
                if back and back[1] in labels:
                    spans.append((labels[back[1]], len(code)))
        assert spans, "the machine code has no loop"
        inside = {i for begin, end in spans for i in range(begin, end)}
        return sum(bool(re.search(r"\b(LDL|STL)\b", code[i])) for i in inside)

    @property
    def bytes_a_copy(self) -> set[int]:
        """Widths of the asynchronous copies from global to shared memory."""
        return {int(bits or 32) // 8 for bits in re.findall(r"LDGSTS\.E(?:\.BYPASS)?(?:\.(64|128))?", self.sass)}


class _Driver:
    """What the launcher asks of a GPU."""

    def __init__(self, chip: int) -> None:
        self.chip = chip

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.chip, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def compile_for(chip: int, folder: Path) -> list[Compiled]:
    """From now on a launch compiles for sm_``chip``, runs nothing, and appends to the list that is returned."""
    for name, backend in backends.items():
        backend.driver.is_active = staticmethod(lambda name=name: name == "nvidia")
    driver.set_active(_Driver(chip))
    compiled: list[Compiled] = []
    known: dict[str, Compiled] = {}
    original = jit.JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = original(self, *args, grid=grid, warmup=True, **options)
        kernel = kernel.result() if hasattr(kernel, "result") else kernel
        if kernel.hash not in known:
            cubin = folder / f"{len(known)}.cubin"
            cubin.write_bytes(kernel.asm["cubin"])
            usage = re.search(r"REG:(\d+)", _tool("cuobjdump", "-res-usage", str(cubin)))
            assert usage is not None
            sass = _tool("nvdisasm", "-c", str(cubin))
            known[kernel.hash] = Compiled(self.fn.__name__, kernel.hash, kernel.metadata.shared, int(usage[1]), sass)
        compiled.append(known[kernel.hash])
        return kernel

    jit.JITFunction.run = run
    return compiled
