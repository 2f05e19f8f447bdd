"""Which GPUs a build can run on, and what is said of the others."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from resq_vllm import cuda, linear, ops
from resq_vllm.cuda import Machine, problem
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
    ("chip", "archs"),
    [((8, 0), ["sm_86"]), ((9, 0), ["sm_89"]), ((10, 0), ["sm_90a"]), ((8, 9), ["compute_90"]), ((9, 0), ["sm_80"])],
)
def test_a_build_without_the_chips_code_says_what_was_built(chip: tuple[int, int], archs: list[str]) -> None:
    said = problem(Machine("GPU", chip, 13000), archs, 13000)
    assert said is not None
    assert f"which has {archs[0]};" in said
    assert said.endswith(f"RESQ_CUDA_ARCHS=sm_{chip[0]}{chip[1]}")


def test_a_driver_of_an_older_major_version_is_too_old() -> None:
    said = problem(Machine("H200", (9, 0), 12040), ALL, 13000)
    assert said is not None
    assert "its driver supports CUDA 12.4, but the kernels were built with CUDA 13.0; update the driver" in said
    assert problem(Machine("H200", (9, 0), 12040), ALL, 12080) is None


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
