"""What nvcc made of the GEMM kernels: registers, spills, and the tensor-core instructions in the machine code."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

from tools import cuda_build

NVCC = cuda_build.find_nvcc()
SOURCES = Path(__file__).resolve().parents[3] / "csrc" / "cuda"
# Registers a thread, so that as many CTAs share a processor as csrc/cuda/gemm_table.h counts on.
LIMITS = {
    ("gemm_decode", "DecodeShape<2, 1, 4>"): 128,
    ("gemm_decode", "DecodeShape<4, 1, 4>"): 128,
    ("gemm_decode", "DecodeShape<2, 2, 4>"): 128,
    ("gemm_decode", "DecodeShape<4, 2, 3>"): 128,
    ("gemm_tiled", "TiledShape<2, 4, 4, 1, 4, false, false>"): 168,
    ("gemm_tiled", "TiledShape<2, 4, 4, 1, 4, true, false>"): 168,
    ("gemm_tiled", "TiledShape<2, 8, 4, 1, 4, true, false>"): 168,
    ("gemm_tiled", "TiledShape<2, 8, 4, 2, 3, true, false>"): 255,
    ("gemm_tiled", "TiledShape<2, 8, 4, 1, 4, false, false>"): 255,
    ("gemm_tiled", "TiledShape<2, 8, 4, 2, 3, false, false>"): 255,
    ("gemm_int4_sm80", "TiledShape<2, 8, 4, 1, 4, false, true>"): 255,
    ("gemm_int4_sm80", "TiledShape<2, 8, 4, 2, 3, false, true>"): 255,
    ("gemm_wgmma_sm90", "WgmmaShape<64, 7>"): 168,
    ("gemm_wgmma_sm90", "WgmmaShape<128, 6>"): 168,
}
# An instruction that every kernel of the file must have.
INSTRUCTIONS = {
    ("gemm_decode", "sm_80"): "IMMA.16832.S8.U8",
    ("gemm_decode", "sm_90a"): "IMMA.16832.S8.U8",
    ("gemm_tiled", "sm_80"): "IMMA.16832.S8.U8",
    ("gemm_tiled", "sm_90a"): "IMMA.16832.S8.U8",
    ("gemm_int4_sm80", "sm_80"): "IMMA.16864.S4.U4",
    ("gemm_wgmma_sm90", "sm_90a"): "IGMMA.64x",
}


def cuobjdump() -> str | None:
    found = shutil.which("cuobjdump")
    spec = importlib.util.find_spec("triton")
    if found or spec is None or spec.origin is None:
        return found
    bundled = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(bundled) if bundled.exists() else None


@cache
def compiled(name: str, arch: str, folder: Path) -> tuple[str, Path]:
    """ptxas's report with names demangled, and the machine code."""
    assert NVCC is not None
    target = folder / f"{name}.{arch}.cubin"
    flags = [flag for flag in cuda_build.KERNEL_FLAGS if flag not in ("-cudart", "static")]
    command = [
        str(NVCC),
        *flags,
        *cuda_build.gencode((arch,)),
        "-cubin",
        str(SOURCES / f"{name}.cu"),
        "-o",
        str(target),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    text = subprocess.run(["c++filt"], input=done.stdout + done.stderr, capture_output=True, text=True, check=True)
    return text.stdout, target


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cubin")


@pytest.mark.skipif(NVCC is None, reason="there is no nvcc")
@pytest.mark.parametrize(("name", "arch"), INSTRUCTIONS)
def test_registers_and_spills_are_within_their_limits(name: str, arch: str, folder: Path) -> None:
    report, _ = compiled(name, arch, folder)
    assert "C75" not in report, "ptxas gave up on asynchronous wgmma or on setmaxnreg"
    seen = set()
    for entry in report.split("Compiling entry function ")[1:]:
        shape = re.search(r"(\w+Shape<[^>]*>)", entry)
        assert shape is not None, entry
        spills = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry)
        registers = re.search(r"Used (\d+) registers", entry)
        assert spills is not None, entry
        assert registers is not None, entry
        assert [int(count) for count in spills.groups()] == [0, 0, 0], f"{shape[1]} on {arch} spills: {spills[0]}"
        assert int(registers[1]) <= LIMITS[name, shape[1]], f"{shape[1]} on {arch} uses {registers[1]} registers"
        seen.add((name, shape[1]))
    assert seen == {key for key in LIMITS if key[0] == name}


@pytest.mark.skipif(NVCC is None or cuobjdump() is None, reason="there is no nvcc or no cuobjdump")
@pytest.mark.parametrize(("name", "arch"), INSTRUCTIONS)
def test_machine_code_has_the_tensor_core_instructions(name: str, arch: str, folder: Path) -> None:
    tool = cuobjdump()
    assert tool is not None
    dump = subprocess.run(
        [tool, "-sass", str(compiled(name, arch, folder)[1])], capture_output=True, text=True, check=True
    ).stdout
    functions = dump.split("Function : ")[1:]
    assert len(functions) == sum(key[0] == name for key in LIMITS)
    for function in functions:
        assert INSTRUCTIONS[name, arch] in function, function.partition("\n")[0]
        assert not re.search(r"\b(LDL|STL)\b", function), "a register array went to local memory"
