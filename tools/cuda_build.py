"""Compiles csrc/cuda into resq_vllm/_C_cuda.abi3.so with nvcc: in parallel, and only what changed.

`setup.py` calls it beside the build of the CPU library; `python -m tools.cuda_build` builds this library alone.

Standard library only: setup.py imports it. Kernels (`*.cu`) see no torch headers, bindings (`*.cpp`) no CUDA headers. A
file whose name ends in `_sm80` or `_sm90` is compiled only for the chosen architectures 8.x or 9.0a, if any are chosen.
"""

from __future__ import annotations

import glob
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OBJECTS = ROOT / "build" / "cuda"
# Machine code for the chips from Ampere to Hopper, and PTX that a driver compiles for later ones.
DEFAULT_ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90a", "compute_90")
# torch 2.10, as for the CPU library.
TORCH_TARGET = "0x020a000000000000"

# 8.6 and 8.9 run the code of 8.0; where memory is the bound, code of their own would only lengthen the build.
BOUND_BY_MEMORY = ("quantize", "quantize_contiguous", "hadamard", "kv_decode")

KERNEL_FLAGS = ("-O3", "-std=c++20", "--expt-relaxed-constexpr", "-Xptxas", "-v", "-cudart", "static")
HOST_FLAGS = ("-O2", "-std=c++20", "-g0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")


class CudaBuildError(RuntimeError):
    """The library cannot be built; the message is one sentence."""


def find_nvcc() -> Path | None:
    """nvcc of CUDA_HOME (or CUDA_PATH), of PATH, or of NVIDIA's wheels in this environment."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        home = os.environ.get(variable)
        if home and (Path(home) / "bin" / "nvcc").exists():
            return Path(home) / "bin" / "nvcc"
    on_path = shutil.which("nvcc")
    if on_path:
        return Path(on_path)
    wheels = [found for folder in sys.path for found in glob.glob(f"{folder}/nvidia/*/bin/nvcc")]
    return Path(wheels[0]) if wheels else None


def wanted() -> bool:
    """Whether CUDA kernels are to be built at all: RESQ_CUDA=0 leaves them out."""
    return os.environ.get("RESQ_CUDA", "1") != "0"


def chosen_archs() -> tuple[str, ...]:
    """RESQ_CUDA_ARCHS ("sm_80,sm_90a", "8.0;9.0a", "compute_90") or the default; CudaBuildError names a bad entry."""
    text = os.environ.get("RESQ_CUDA_ARCHS", "")
    names = [name for name in re.split(r"[\s,;]+", text) if name]
    if not names:
        return DEFAULT_ARCHS
    archs = []
    for name in names:
        match = re.fullmatch(r"(sm_|compute_|)(\d{1,2})\.?(\d)(a?)", name)
        if match is None or int(match[2] + match[3]) < 80:
            raise CudaBuildError(
                f"RESQ_CUDA_ARCHS: {name!r} is no architecture from sm_80 on; write it as in sm_80,sm_90a"
            )
        archs.append(f"{match[1] or 'sm_'}{match[2]}{match[3]}{match[4]}")
    return tuple(dict.fromkeys(archs))


def require_support(nvcc: Path, archs: tuple[str, ...]) -> None:
    """Raise CudaBuildError when this nvcc knows not all of the architectures."""
    listing = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=False).stdout.split()
    unknown = [arch for arch in archs if f"sm_{re.sub(r'[a-z_]', '', arch)}" not in listing]
    if unknown:
        raise CudaBuildError(
            f"{nvcc} cannot compile for {', '.join(unknown)}, only for {', '.join(listing)}; set RESQ_CUDA_ARCHS"
        )


def for_file(name: str, archs: tuple[str, ...]) -> tuple[str, ...]:
    """The architectures that a kernel file is compiled for."""
    if name in BOUND_BY_MEMORY and "sm_80" in archs:
        return tuple(a for a in archs if a not in ("sm_86", "sm_89"))
    if name.endswith("_sm80"):
        return tuple(a for a in archs if a.startswith(("sm_8", "compute_8"))) or archs
    if name.endswith("_sm90"):
        return tuple(a for a in archs if a == "sm_90a") or archs
    return archs


def gencode(archs: tuple[str, ...]) -> list[str]:
    """nvcc's options for the architectures: machine code for sm_*, PTX for compute_*."""
    flags = []
    for arch in archs:
        virtual = arch.replace("sm_", "compute_")
        flags += ["-gencode", f"arch={virtual},code={arch}"]
    return flags


@dataclass(frozen=True)
class Step:
    """One compiler call. Its dependency file, command line and messages (ptxas's report) lie beside the object."""

    source: Path
    object: Path
    command: list[str]

    @property
    def log(self) -> Path:
        return self.object.with_suffix(".log")

    def fresh(self) -> bool:
        stamp, depends = self.object.with_suffix(".cmd"), self.object.with_suffix(".d")
        if not (self.object.exists() and depends.exists() and stamp.exists() and self.log.exists()):
            return False
        if stamp.read_text() != shlex.join(self.command):
            return False
        made = self.object.stat().st_mtime
        names = depends.read_text().replace("\\\n", " ").partition(":")[2].split()
        return all(os.path.exists(name) and os.path.getmtime(name) <= made for name in names)

    def run(self) -> None:
        if self.fresh():
            return
        self.object.unlink(missing_ok=True)
        done = subprocess.run(self.command, cwd=ROOT, capture_output=True, text=True, check=False)
        messages = done.stdout + done.stderr
        if done.returncode:
            raise CudaBuildError(f"`{shlex.join(self.command)}` failed:\n{messages}")
        warnings = [line for line in messages.splitlines() if "warning" in line.lower()]
        if warnings:
            print("\n".join(warnings), file=sys.stderr)
        self.log.write_text(messages)
        self.object.with_suffix(".cmd").write_text(shlex.join(self.command))


def toolkit_folders(nvcc: Path, kind: str) -> list[Path]:
    """Folders `kind` (include, lib) of the sibling wheels of an nvcc that came as a wheel; none for a toolkit."""
    parent = nvcc.resolve().parents[2]
    return [folder for folder in sorted(parent.glob(f"*/{kind}")) if folder.is_dir()] if parent.name == "nvidia" else []


def steps(nvcc: Path, archs: tuple[str, ...], torch: Path) -> list[Step]:
    """All compiler calls, the longest first."""
    OBJECTS.mkdir(parents=True, exist_ok=True)
    result = []
    kernels = sorted((ROOT / "csrc" / "cuda").glob("*.cu"), key=lambda path: (-path.stat().st_size, path.name))
    for source in kernels:
        target = OBJECTS / f"{source.stem}.cu.o"
        command = [str(nvcc), *KERNEL_FLAGS, *gencode(for_file(source.stem, archs))]
        command += ["-Xcompiler", "-fPIC,-fvisibility=hidden", *(f"-I{p}" for p in toolkit_folders(nvcc, "include"))]
        command += ["-MMD", "-MF", str(target.with_suffix(".d")), "-c", str(source), "-o", str(target)]
        result.append(Step(source, target, command))
    # The runs of a plan are found by the CPU library's code; hidden symbols keep the two copies apart.
    for source in [*sorted((ROOT / "csrc" / "cuda").glob("*.cpp")), ROOT / "csrc" / "cpu" / "plan.cpp"]:
        target = OBJECTS / f"{source.parent.name}_{source.stem}.o"
        command = [os.environ.get("CXX", "g++"), *HOST_FLAGS, "-DUSE_CUDA", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
        command += [f'-DRESQ_CUDA_ARCHS="{" ".join(archs)}"', f"-isystem{torch / 'include'}"]
        command += [f"-isystem{sysconfig.get_path('include')}"]
        command += ["-MMD", "-MF", str(target.with_suffix(".d")), "-c", str(source), "-o", str(target)]
        result.append(Step(source, target, command))
    return result


def stub_folder(torch: Path) -> list[Path]:
    """A folder with an empty libtorch_cuda.so for a torch without CUDA: the library is then built, not loaded."""
    if (torch / "lib" / "libtorch_cuda.so").exists():
        return []
    stub = OBJECTS / "stub" / "libtorch_cuda.so"
    if not stub.exists():
        stub.parent.mkdir(parents=True, exist_ok=True)
        compiler = os.environ.get("CXX", "g++")
        command = [compiler, "-x", "c", "-", "-shared", "-Wl,-soname,libtorch_cuda.so", "-o", str(stub)]
        subprocess.run(command, input="", text=True, check=True)
    return [stub.parent]


def build(target: Path, torch: Path, jobs: int | None = None) -> bool:
    """Compile what changed and link it to ``target``; returns whether anything was done.

    torch: the installed package's folder. Raises CudaBuildError with the compiler's messages.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise CudaBuildError("nvcc was not found: install the CUDA toolkit, or name it by CUDA_HOME")
    archs = chosen_archs()
    todo = steps(nvcc, archs, torch)
    if any(not step.fresh() for step in todo):
        require_support(nvcc, archs)
    with ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
        list(pool.map(Step.run, todo))
    if target.exists() and all(step.object.stat().st_mtime <= target.stat().st_mtime for step in todo):
        return False
    folders = [torch / "lib", *stub_folder(torch), *toolkit_folders(nvcc, "lib")]
    link = [str(nvcc), "-shared", "-cudart", "static", *(str(step.object) for step in todo)]
    link += [*(f"-L{folder}" for folder in folders), "-Xlinker", "--no-as-needed"]
    link += ["-ltorch", "-ltorch_cpu", "-ltorch_cuda", "-o", str(target)]
    target.parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(link, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CudaBuildError(f"`{shlex.join(link)}` failed:\n{done.stdout}{done.stderr}")
    return True


def main() -> int:
    """Command line; returns the exit status."""
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        print("tools.cuda_build: torch is not installed, whose headers the bindings need", file=sys.stderr)
        return 1
    target = ROOT / "resq_vllm" / "_C_cuda.abi3.so"
    try:
        done = build(target, Path(torch.origin).parent)
    except CudaBuildError as error:
        print(f"tools.cuda_build: {error}", file=sys.stderr)
        return 1
    print(f"{target.name} for {', '.join(chosen_archs())}: {'built' if done else 'nothing changed'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
