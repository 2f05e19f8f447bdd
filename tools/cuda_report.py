"""What nvcc made of the CUDA kernels, against csrc/cuda/limits.json: registers, spills and tensor-core instructions.

`python -m tools.cuda_report` checks the objects of the last build and prints what is wrong; with
`--record quantize hadamard` it writes these files' registers as the new limits. The registers are ptxas's own report,
kept beside every object. No kernel of any file may spill; registers are limited in the files that are recorded, those
of the GEMMs to what lets as many CTAs share a processor as csrc/cuda/gemm_table.h counts on.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tools.cuda_build import OBJECTS, ROOT

LIMITS = ROOT / "csrc" / "cuda" / "limits.json"
_KERNEL = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")


@dataclass(frozen=True)
class Usage:
    """One kernel for one architecture: registers a thread, and bytes spilled to local memory (stores and loads)."""

    file: str
    kernel: str
    arch: str
    registers: int
    spilled: int


def usages(folder: Path = OBJECTS) -> list[Usage]:
    """Every kernel of the last build."""
    found = [usage for log in sorted(folder.glob("*.cu.log")) for usage in _parse(log.name[:-7], log.read_text())]
    names = _demangled([usage.kernel for usage in found])
    return [Usage(u.file, names[u.kernel], u.arch, u.registers, u.spilled) for u in found]


def _parse(file: str, report: str) -> Iterator[Usage]:
    kernel = arch = ""
    spilled = 0
    for line in report.splitlines():
        if match := _KERNEL.search(line):
            kernel, arch, spilled = match[1], match[2], 0
        elif match := _SPILLS.search(line):
            spilled += int(match[2]) + int(match[3])
        elif kernel and (match := _REGISTERS.search(line)):
            yield Usage(file, kernel, arch, int(match[1]), spilled)
            kernel = ""


def _demangled(names: list[str]) -> dict[str, str]:
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return {mangled: _short(name) for mangled, name in zip(names, done.stdout.splitlines(), strict=True)}


def _short(name: str) -> str:
    """A kernel's name and template arguments: no namespaces, no casts of numbers, no parameters."""
    name = re.sub(r"\((?:bool|int|long|resq::cuda::\w+)\)(-?\d)", r"\1", name.replace("(anonymous namespace)::", ""))
    return re.sub(r"\(.*|^void |resq::cuda::", "", name)


def instructions(object_file: Path, arch: str) -> dict[str, str]:
    """SASS of an object's kernels for ``arch``, by the cuobjdump that Triton's wheel brings (or the toolkit's)."""
    tool = cuobjdump()
    assert tool is not None, "cuobjdump and nvdisasm were not found: install triton, or a toolkit below /usr/local"
    environment = {"PATH": f"{tool.parent}:/usr/bin:/bin"}
    command = [str(tool), "-sass", "-arch", arch, str(object_file)]
    dump = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    functions = (function.partition("\n") for function in dump.split("Function : ")[1:])
    return {name.strip(): code for name, _, code in functions}


def gave_up(folder: Path = OBJECTS) -> list[str]:
    """ptxas's remarks (C75xx) that it serialised wgmma or ignored setmaxnreg, each with its file."""
    logs = sorted(folder.glob("*.cu.log"))
    return [f"{log.name[:-7]}: {line}" for log in logs for line in log.read_text().splitlines() if "(C75" in line]


def cuobjdump() -> Path | None:
    """cuobjdump with its nvdisasm, from Triton's wheel or a toolkit; None where there is neither."""
    folders = [Path(p) / "triton" / "backends" / "nvidia" / "bin" for p in sys.path]
    folders += sorted(Path("/usr/local").glob("cuda*/bin"), reverse=True)
    return next((f / "cuobjdump" for f in folders if (f / "cuobjdump").exists() and (f / "nvdisasm").exists()), None)


def wrong(found: list[Usage], limits: dict[str, dict[str, dict[str, int]]]) -> list[str]:
    """One sentence for every kernel that spills, or that a recorded file has with more registers, or newly."""
    said = []
    for u in found:
        limit = limits.get(u.file, {}).get(u.kernel, {}).get(u.arch)
        name = f"{u.file}: {u.kernel} for {u.arch}"
        if u.spilled:
            said.append(f"{name} spills {u.spilled} bytes")
        if u.file not in limits:
            continue
        if limit is None:
            said.append(f"{name} has no limit; record it with `python -m tools.cuda_report --record {u.file}`")
        elif u.registers > limit:
            said.append(f"{name} uses {u.registers} registers, more than the recorded {limit}")
    return said


def record(found: list[Usage], files: list[str]) -> None:
    """Write the registers of the files' kernels as limits; all else in the file stays."""
    document = json.loads(LIMITS.read_text())
    for file in files:
        document["registers"][file] = {}
    for u in sorted(found, key=lambda u: (u.file, u.kernel, u.arch)):
        if u.file in files:
            document["registers"][u.file].setdefault(u.kernel, {})[u.arch] = u.registers
    LIMITS.write_text(json.dumps(document, indent=2) + "\n")


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", nargs="+", metavar="FILE", help="write these files' registers as the new limits")
    arguments = parser.parse_args()
    found = usages()
    if arguments.record:
        record(found, arguments.record)
        return 0
    said = wrong(found, json.loads(LIMITS.read_text())["registers"])
    print("\n".join(said) if said else f"{len(found)} kernels, none of which spills; registers are within the limits")
    return bool(said)


if __name__ == "__main__":
    sys.exit(main())
