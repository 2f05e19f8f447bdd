"""Choosing architectures, and compiling only what changed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.csrc.cuda.nvcc import needs_nvcc
from tools import cuda_build
from tools.cuda_build import CudaBuildError, Step, chosen_archs, for_file, gencode


@pytest.mark.parametrize(
    ("text", "archs"),
    [
        ("", cuda_build.DEFAULT_ARCHS),
        ("sm_80,sm_90a", ("sm_80", "sm_90a")),
        ("8.0;9.0a", ("sm_80", "sm_90a")),
        ("86 compute_90 86", ("sm_86", "compute_90")),
        ("12.0", ("sm_120",)),
    ],
)
def test_archs(monkeypatch: pytest.MonkeyPatch, text: str, archs: tuple[str, ...]) -> None:
    monkeypatch.setenv("RESQ_CUDA_ARCHS", text)
    assert chosen_archs() == archs


@pytest.mark.parametrize("text", ["sm_75", "hopper", "sm_90b", "7.5", "sm_"])
def test_a_bad_arch_is_named(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("RESQ_CUDA_ARCHS", f"sm_80,{text}")
    with pytest.raises(CudaBuildError, match=f"RESQ_CUDA_ARCHS: '{text}' is no architecture from sm_80 on"):
        chosen_archs()


def test_files_for_one_family() -> None:
    archs = cuda_build.DEFAULT_ARCHS
    assert for_file("gemm_wgmma_sm90", archs) == ("sm_90a",)
    assert for_file("gemm_int4_sm80", archs) == ("sm_80", "sm_86", "sm_89")
    # A chip 8.0 runs the PTX of this build, and its 4-bit kernels must be there too.
    assert for_file("gemm_int4_sm80", ("compute_80", "sm_89", "sm_90a")) == ("compute_80", "sm_89")
    assert for_file("gemm_tiled", archs) == archs
    assert for_file("quantize", archs) == ("sm_80", "sm_90a", "compute_90")
    assert for_file("quantize", ("sm_86",)) == ("sm_86",)
    # The launchers are needed all the same.
    assert for_file("gemm_wgmma_sm90", ("sm_80",)) == ("sm_80",)


def test_machine_code_and_ptx() -> None:
    flags = ["-gencode", "arch=compute_90a,code=sm_90a", "-gencode", "arch=compute_90,code=compute_90"]
    assert gencode(("sm_90a", "compute_90")) == flags


def test_an_object_is_fresh_until_its_sources_or_its_command_change(tmp_path: Path) -> None:
    source, header = tmp_path / "a.c", tmp_path / "a.h"
    header.write_text("int f(void);\n")
    source.write_text('#include "a.h"\nint f(void) { return 1; }\n')
    target = tmp_path / "a.o"
    command = ["gcc", "-MMD", "-MF", str(target.with_suffix(".d")), "-c", str(source), "-o", str(target)]
    step = Step(source, target, command)
    assert not step.fresh()
    step.run()
    assert step.fresh()
    assert not Step(source, target, [*command, "-O1"]).fresh()
    later = target.stat().st_mtime + 10
    os.utime(header, (later, later))
    assert not step.fresh()
    source.write_text("int f(void) { return }\n")
    with pytest.raises(CudaBuildError, match="error"):
        step.run()
    assert not step.fresh(), "a failed call leaves no object"


@needs_nvcc
def test_a_second_build_does_nothing(tmp_path: Path) -> None:
    target = tmp_path / "_C_cuda.abi3.so"
    folder = Path(torch.__file__).parent
    assert cuda_build.build(target, folder)
    assert not cuda_build.build(target, folder)


def test_without_nvcc_the_build_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cuda_build, "find_nvcc", lambda: None)
    with pytest.raises(CudaBuildError, match="nvcc was not found"):
        cuda_build.build(tmp_path / "_C_cuda.abi3.so", tmp_path)


@needs_nvcc
def test_an_architecture_that_nvcc_does_not_know_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RESQ_CUDA_ARCHS", "sm_999")
    with pytest.raises(CudaBuildError, match="cannot compile for sm_999, only for sm_"):
        cuda_build.build(tmp_path / "_C_cuda.abi3.so", Path(torch.__file__).parent)
