"""benchmarks.gpu_linear without a GPU: the refusal, the ceilings' arithmetic, the layers it measures."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from benchmarks.gpu_checks import SHAPES, cases, expected
from benchmarks.gpu_contenders import LLAMA_8B, LLAMA_70B, OurWeight, Shape, contenders, our_bytes
from benchmarks.gpu_linear import fraction, table
from resq_vllm import ops
from resq_vllm.quantized_linear import KERNELS, runs_on


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_sentence_and_code_2() -> None:
    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu_linear"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "GPU" in done.stderr


@pytest.mark.parametrize("shape", LLAMA_8B + LLAMA_70B, ids=lambda shape: shape.name)
def test_plans_cover_the_columns(shape: Shape) -> None:
    assert shape.plan().columns == shape.columns


def test_bytes_are_those_of_the_format() -> None:
    assert our_bytes(Shape("", "qkv", 10, 4096)) == 10 * (3584 // 2 + 512 + 8 + 8)
    int8, nibbles = contenders()["w8a8-int8"].weight_bytes, contenders()["marlin"].weight_bytes
    assert int8(Shape("", "qkv", 10, 4096)) == 10 * (4096 + 4)
    assert nibbles(Shape("", "qkv", 10, 4096)) == 10 * (2048 + 64)


def test_fraction_is_of_the_slower_ceiling() -> None:
    ceilings = {"bytes": 1e12, "int8": 1e15}
    assert fraction(ceilings, "int8", 10**9, 1.0, 2e-3) == pytest.approx(0.5)
    assert fraction(ceilings, "int8", 1, 1e15, 4.0) == pytest.approx(0.25)


@pytest.mark.parametrize("major", [8, 9, 12])
def test_checks_run_every_kernel_of_the_chip_on_every_site(major: int) -> None:
    seen = {(kernel, SHAPES[shape][0]) for kernel, _, _, shape, _ in cases(major)}
    assert seen == {(k, s[0]) for k in KERNELS for s in SHAPES if runs_on(k, major, Shape("", *s).plan())}
    assert any(kernel.startswith("wgmma") for kernel, _ in seen) == (major == 9)
    assert ({site for kernel, site in seen if kernel.endswith("s4")} == {"qkv", "down", "head", "gate_up"}) == (
        major == 8
    )


@pytest.mark.parametrize("site", ["qkv", "o", "down", "head"])
def test_expected_values_of_the_check_are_those_of_the_cpu_kernels(site: str) -> None:
    weight = OurWeight(Shape("", site, 48, 1024), device="cpu")
    x = torch.randn(5, 1024, generator=torch.Generator().manual_seed(1)).bfloat16()
    integers, y = expected(weight, weight.quantized(x), x)
    assert integers.shape == (len(weight.plan.runs), 5, 48)
    ours = ops.linear(x, weight.packed, weight.scales, weight.sums, None, 48, weight.segments, weight.group_bits)
    assert torch.equal(y, ours)


def test_table_names_the_kernel() -> None:
    line = {"layer": "8B o", "M": 1, "contender": "resq", "median_us": 4.0, "ratio_to_bf16": 2.5, "gb_s": 2000.0}
    view = table([line | {"top_s": 1.0, "fraction": 0.5, "kernel": "decode_m8_n32 x2"}])
    assert view.row_count == 1
