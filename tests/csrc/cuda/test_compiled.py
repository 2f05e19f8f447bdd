"""What nvcc made of the kernels: no spills, registers as recorded, and the instructions that are meant."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from tests.csrc.cuda.nvcc import REQUIRED, needs_cuobjdump, needs_nvcc
from tools import cuda_build, cuda_report

pytestmark = needs_nvcc
LIMITS = json.loads(cuda_report.LIMITS.read_text())
CHOSEN = cuda_build.chosen_archs()
WANTED = [
    (file, arch)
    for file, archs in LIMITS["instructions"].items()
    for arch in archs
    if arch in cuda_build.for_file(file, CHOSEN)
]


@pytest.fixture(scope="module", autouse=True)
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library of the current sources; objects of an earlier build are kept where they are fresh."""
    target = tmp_path_factory.mktemp("cuda") / "_C_cuda.abi3.so"
    cuda_build.build(target, Path(torch.__file__).parent)
    return target


def test_registers_and_spills() -> None:
    assert cuda_report.wrong(cuda_report.usages(), LIMITS["registers"]) == []


def test_kernels_are_compiled_for_every_chosen_architecture() -> None:
    assert {u.arch for u in cuda_report.usages()} == {a for a in CHOSEN if a.startswith("sm_")}


@pytest.mark.skipif(not REQUIRED, reason="RESQ_CUDA_ARCHS may choose others, outside of CI")
def test_ampere_and_hopper_are_chosen_where_kernels_must_be_checked() -> None:
    assert {"sm_80", "sm_90a"} <= set(CHOSEN)


def test_every_recorded_kernel_is_built() -> None:
    built = {(u.file, u.kernel) for u in cuda_report.usages() if u.file in LIMITS["registers"]}
    assert {(file, kernel) for file, kernels in LIMITS["registers"].items() for kernel in kernels} == built


@needs_cuobjdump
@pytest.mark.parametrize(("file", "arch"), WANTED)
def test_instructions(file: str, arch: str) -> None:
    kernels = cuda_report.instructions(cuda_build.OBJECTS / f"{file}.cu.o", arch)
    assert len(kernels) == len(LIMITS["registers"][file])
    for kernel, sass in kernels.items():
        for instruction in LIMITS["instructions"][file][arch]:
            assert instruction in sass, f"{kernel} for {arch} has no {instruction}"
        if file.startswith(("gemm", "kv_")):
            assert not re.search(r"\b(LDL|STL)\b", sass), f"{kernel} for {arch}: a register array in local memory"


def test_ptxas_kept_asynchronous_wgmma() -> None:
    assert cuda_report.gave_up() == []


def test_a_spill_and_a_new_register_are_told() -> None:
    usage = cuda_report.Usage("gemm", "kernel<8>", "sm_80", 60, 8)
    said = cuda_report.wrong([usage], {"gemm": {"kernel<8>": {"sm_80": 56}}})
    assert said == [
        "gemm: kernel<8> for sm_80 spills 8 bytes",
        "gemm: kernel<8> for sm_80 uses 60 registers, more than the recorded 56",
    ]
    assert "has no limit" in cuda_report.wrong([usage], {"gemm": {}})[1]
    assert cuda_report.wrong([usage], {}) == ["gemm: kernel<8> for sm_80 spills 8 bytes"]
