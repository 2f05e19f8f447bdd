"""Which GPUs a build can run on, and what is said of the others."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch

from resq_vllm import cuda, linear, ops
from resq_vllm.cuda import Machine, note, problem
from resq_vllm.errors import ResQError
from resq_vllm.formats.metadata import LinearSite
from resq_vllm.formats.plan import linear_plan
from resq_vllm.linear import kernels_of

ALL = ["sm_80", "sm_86", "sm_89", "sm_90a", "compute_90"]


@pytest.mark.parametrize("chip", [(8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_default_build_runs_on_every_chip_from_ampere_on(chip: tuple[int, int]) -> None:
    assert problem(Machine("GPU", chip, 13000), ALL, 13000) is None


def test_a_chip_before_ampere_is_named() -> None:
    said = problem(Machine("Tesla T4", (7, 5), 13000), ALL, 13000)
    assert said is not None
    assert said.startswith("Tesla T4 (compute capability 7.5) has no 4-bit tensor cores")


@pytest.mark.parametrize(
    ("chip", "archs", "wanted"),
    [
        ((8, 0), ["sm_86"], "sm_80"),
        ((9, 0), ["sm_89"], "sm_90a"),
        ((10, 0), ["sm_90a"], "sm_100"),
        ((12, 0), ["sm_90", "sm_100"], "sm_120"),
        ((8, 9), ["compute_90"], "sm_89"),
        ((9, 0), ["sm_80"], "sm_90a"),
    ],
)
@pytest.mark.parametrize("allow_slow", [False, True])
def test_a_build_without_the_chips_code_says_what_was_built(
    chip: tuple[int, int], archs: list[str], wanted: str, allow_slow: bool
) -> None:
    said = problem(Machine("GPU", chip, 13000), archs, 13000, allow_slow)
    assert said is not None
    assert f"cannot run the CUDA kernels of this build, which has {', '.join(archs)};" in said
    assert said.endswith(f"RESQ_CUDA_ARCHS={wanted}")


@pytest.mark.parametrize("archs", [["sm_90"], ["compute_90"], ["sm_80", "sm_90", "compute_90"], ["compute_90a"]])
def test_hopper_without_its_own_code_is_refused_until_it_is_allowed(archs: list[str]) -> None:
    machine = Machine("NVIDIA H200", (9, 0), 13000)
    said = problem(machine, archs, 13000)
    assert said == (
        "NVIDIA H200 (compute capability 9.0) would run slower kernels than it can, since this build has "
        f"{', '.join(archs)} and not the wgmma kernels of sm_90a; reinstall resq-vllm with `pip install "
        "--no-build-isolation .` where nvcc is on PATH and RESQ_CUDA_ARCHS=sm_90a, or allow the slower ones by "
        "RESQ_ALLOW_SLOW_KERNELS=1"
    )
    assert problem(machine, archs, 13000, allow_slow=True) is None
    assert note(machine, archs).startswith(
        "NVIDIA H200 (compute capability 9.0) runs the 8-bit mma.sync kernels, not the wgmma kernels of sm_90a, since "
        f"this build has {', '.join(archs)} and RESQ_ALLOW_SLOW_KERNELS=1 allows it"
    )
    assert ("compiles them from PTX" in note(machine, archs)) == all(arch.startswith("compute") for arch in archs)


def test_ampere_with_ptx_alone_has_no_4_bit_kernels() -> None:
    machine = Machine("NVIDIA A100", (8, 0), 13000)
    said = problem(machine, ["compute_80"], 13000)
    assert said is not None
    assert "and not the 4-bit mma.sync kernels of sm_8x" in said
    assert "RESQ_CUDA_ARCHS=sm_80" in said
    assert problem(machine, ["compute_80"], 13000, allow_slow=True) is None
    # Machine code for another chip 8.x: the file of these kernels has the PTX as well (tools/cuda_build.py).
    assert problem(machine, ["sm_89", "compute_80"], 13000) is None


@pytest.mark.parametrize("chip", [(8, 0), (8, 6), (8, 9), (9, 0)])
def test_nothing_is_said_of_a_chip_with_all_its_kernels(chip: tuple[int, int]) -> None:
    assert note(Machine("GPU", chip, 13000), ALL) == ""


def test_chips_after_hopper_run_the_best_there_is_and_the_log_says_so() -> None:
    for name, chip in (("NVIDIA B200", (10, 0)), ("RTX 5090", (12, 0))):
        machine = Machine(name, chip, 13000)
        assert problem(machine, ["compute_90"], 13000) is None
        assert note(machine, ["compute_90"]) == (
            f"{name} (compute capability {chip[0]}.{chip[1]}) runs the 8-bit mma.sync kernels, the fastest that ResQ "
            "has for it; the driver compiles them from PTX (compute_90) when they are first used"
        )
    assert note(Machine("NVIDIA B200", (10, 0), 13000), ["compute_90", "sm_100"]).endswith("that ResQ has for it")


def test_a_driver_of_an_older_major_version_is_too_old() -> None:
    said = problem(Machine("H200", (9, 0), 12040), ALL, 13000)
    assert said is not None
    assert "its driver supports CUDA 12.4, but the kernels were built with CUDA 13.0; update the driver" in said
    assert problem(Machine("H200", (9, 0), 12040), ALL, 12080) is None


def test_ptx_needs_a_driver_as_new_as_its_compiler() -> None:
    said = problem(Machine("NVIDIA B200", (10, 0), 13000), ALL, 13010)
    assert said == (
        "NVIDIA B200 (compute capability 10.0) would have to compile this build's PTX (compute_90), but its driver "
        "supports CUDA 13.0 and the PTX is of CUDA 13.1; update the driver, or reinstall resq-vllm with `pip install "
        "--no-build-isolation .` where nvcc is on PATH and RESQ_CUDA_ARCHS=sm_100"
    )
    assert problem(Machine("NVIDIA B200", (10, 0), 13000), ["sm_100", "compute_90"], 13010) is None
    assert problem(Machine("NVIDIA B200", (10, 0), 13010), ALL, 13010) is None
    assert problem(Machine("H200", (9, 0), 13000), ALL, 13010) is None


@pytest.mark.skipif(torch.version.cuda is not None, reason="says what a PyTorch without CUDA is told")
def test_without_cuda_in_torch_nothing_is_loaded() -> None:
    module, reason = cuda.load()
    assert module is None
    assert "is built without CUDA" in reason


def test_a_layer_on_an_unfit_gpu_is_refused_with_the_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    built = SimpleNamespace(archs="sm_80", runtime_version=13000, driver_version=lambda: 13000)
    monkeypatch.setattr(cuda, "load", lambda: (built, ""))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    cuda.require.cache_clear()
    with pytest.raises(ResQError, match=r"GPU 3 \(compute capability 9.0\) cannot run the CUDA kernels of this build"):
        kernels_of(torch.device("cuda", 3))
    built.archs = "sm_80 sm_90a"
    assert kernels_of(torch.device("cuda", 3), "fused") == "CUDA kernels on GPU 3; RMSNorm and SiLU·mul fused"
    cuda.require.cache_clear()


def test_slower_kernels_run_where_the_switch_says_so_and_the_log_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[tuple[int, str]] = []
    monkeypatch.setattr(cuda, "log_once", lambda level, message: lines.append((level, message)))
    built = SimpleNamespace(archs="sm_80 compute_90", runtime_version=13000, driver_version=lambda: 13000)
    monkeypatch.setattr(cuda, "load", lambda: (built, ""))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0) if index == 3 else (12, 0))
    cuda.require.cache_clear()
    monkeypatch.delenv("RESQ_ALLOW_SLOW_KERNELS", raising=False)
    with pytest.raises(ResQError, match="or allow the slower ones by RESQ_ALLOW_SLOW_KERNELS=1"):
        cuda.require(3)
    monkeypatch.setenv("RESQ_ALLOW_SLOW_KERNELS", "0")
    with pytest.raises(ResQError, match="slower"):
        cuda.require(3)
    assert lines == []
    monkeypatch.setenv("RESQ_ALLOW_SLOW_KERNELS", "1")
    cuda.require(3)
    monkeypatch.delenv("RESQ_ALLOW_SLOW_KERNELS")
    cuda.require(4)
    cuda.require.cache_clear()
    assert [level for level, _ in lines] == [logging.WARNING, logging.INFO]
    assert "9.0) runs the 8-bit mma.sync kernels, not the wgmma kernels of sm_90a" in lines[0][1]
    assert "12.0) runs the 8-bit mma.sync kernels, the fastest that ResQ has for it" in lines[1][1]


def test_each_shape_says_which_kernels_it_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(linear, "log_once", lambda level, message: lines.append(message))
    monkeypatch.setattr(linear, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(linear, "cuda_kernel", lambda tokens, n, *rest: f"kernel_m{tokens}_n{n}_gpu{rest[3]}")
    plan = linear_plan(LinearSite(low=224, high=32), 256, 64)
    linear.log_kernels(plan, 512, 4, torch.device("cuda", 1))
    (line,) = lines
    assert line == (
        "ResQ: linear 256 -> 512: 1 tokens kernel_m1_n512_gpu1, 16 tokens kernel_m16_n512_gpu1, "
        "64 tokens kernel_m64_n512_gpu1, 2048 tokens kernel_m2048_n512_gpu1"
    )
    monkeypatch.setattr(linear, "get_tensor_model_parallel_rank", lambda: 1)
    linear.log_kernels(plan, 512, 4, torch.device("cuda", 1))
    assert len(lines) == 1


def test_the_kernels_of_a_cpu_are_its_instruction_set() -> None:
    assert kernels_of(torch.device("cpu")) == f"CPU kernels {ops.isa()}"
