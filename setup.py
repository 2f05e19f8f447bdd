"""Builds resq_vllm/_C.abi3.so: the CPU kernels and their bindings to torch's stable ABI (metadata: pyproject.toml).

Where nvcc is found, also resq_vllm/_C_cuda.abi3.so with the CUDA kernels (tools/cuda_build.py).
"""

from __future__ import annotations

import importlib.util
import os
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # isolated builds run this file without its folder

from tools import cuda_build  # noqa: E402

CUDA_MODULE = "resq_vllm._C_cuda"
# torch 2.10: the oldest release whose stable ABI has everything the bindings use.
TORCH_TARGET = "0x020a000000000000"


def torch_folder() -> Path:
    """The installed torch package; only its headers and libraries are needed, so it is found but not imported.

    pip's isolated builds hide the packages of the environment that they install into, but not its place.
    """
    spec = importlib.util.find_spec("torch")
    folder = (
        Path(sysconfig.get_path("platlib"), "torch")
        if spec is None or spec.origin is None
        else Path(spec.origin).parent
    )
    if not (folder / "include").is_dir():
        sys.exit("resq-vllm is compiled against torch: install torch, then `pip install --no-build-isolation .`")
    return folder


class BuildKernels(build_ext):
    """setuptools' build_ext with one compiler process per source file and core."""

    def run(self) -> None:
        if cuda_build.wanted() and all(ext.name != CUDA_MODULE for ext in self.extensions):
            print(
                "resq-vllm: nvcc was not found, the CUDA kernels are left out (CUDA_HOME names a toolkit, RESQ_CUDA=0 "
                "leaves them out on purpose)",
                file=sys.stderr,
            )
        super().run()

    def build_extension(self, ext: Extension) -> None:
        torch = torch_folder()
        if ext.name == CUDA_MODULE:
            try:
                cuda_build.build(Path(self.get_ext_fullpath(ext.name)).resolve(), torch)
            except cuda_build.CudaBuildError as error:
                sys.exit(f"resq-vllm: {error}")
            return
        ext.include_dirs = [str(torch / "include")]
        ext.library_dirs = [str(torch / "lib")]
        compile_one = self.compiler.compile

        def compile_all(sources: list[str], **options: object) -> list[str]:
            # The compiler object spawns one process per call and keeps no state between calls.
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = list(pool.map(lambda source: compile_one([source], **options), sources))
            return [path for group in objects for path in group]

        self.compiler.compile = compile_all
        super().build_extension(ext)


def sources() -> list[str]:
    # The largest translation units first, so that the others fill in beside them.
    files = [path.relative_to(ROOT) for folder in ("csrc", "csrc/cpu") for path in (ROOT / folder).glob("*.cpp")]
    return sorted(map(str, files), key=lambda name: ("kernels_" not in name, name))


def cuda_extensions() -> list[Extension]:
    """The CUDA library, where it is wanted and nvcc is there."""
    if not cuda_build.wanted() or cuda_build.find_nvcc() is None:
        return []
    files = sorted(path for path in (ROOT / "csrc" / "cuda").iterdir() if path.suffix in (".cu", ".cpp"))
    return [Extension(CUDA_MODULE, sources=[str(path.relative_to(ROOT)) for path in files], py_limited_api=True)]


setup(
    ext_modules=[
        Extension(
            "resq_vllm._C",
            sources=sources(),
            depends=sorted(
                str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h") if "cuda" not in path.parts
            ),
            define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET)],
            extra_compile_args=[
                "-O3",
                "-std=c++20",
                "-g0",
                "-fvisibility=hidden",
                # Most builds of Python pass it on; without it decode attention ran at 0.64 to 0.8 of its speed.
                "-fwrapv",
                "-ffp-contract=off",  # results equal torch's bit for bit on every instruction set
                # g++ 12 warns about its own <immintrin.h>, and about loops it has proved to be empty.
                "-Wno-uninitialized",
                "-Wno-maybe-uninitialized",
                "-Wno-aggressive-loop-optimizations",
            ],
            extra_link_args=["-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"],
            language="c++",
            py_limited_api=True,
        ),
        *cuda_extensions(),
    ],
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
