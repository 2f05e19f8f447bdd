"""benchmarks.gpu_linear without a GPU: the refusal, the ceilings' arithmetic, the layers it measures."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from benchmarks import gpu_checks, gpu_contenders, gpu_linear
from benchmarks.gpu_check_report import counts
from benchmarks.gpu_checks import SHAPES, cases, expected
from benchmarks.gpu_contenders import LLAMA_8B, LLAMA_70B, OurWeight, Shape, contenders, our_bytes
from benchmarks.gpu_linear import fraction, table
from resq_vllm import ops, quantized_linear
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


def test_time_is_of_a_call_that_waits_behind_another(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            happened.append("record")

        def synchronize(self) -> None:
            happened.append("synchronize")

        def elapsed_time(self, end: Event) -> float:
            return 5.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert gpu_linear.seconds_queued(lambda: happened.append("call")) == 5e-3
    assert happened == ["call", "record", "call", "record", "synchronize"]


def refuse(error: Exception) -> Callable[..., Any]:
    def build(*arguments: Any) -> Any:
        raise error

    return build


@pytest.mark.parametrize("error", [TypeError("no argument b_q\nmore"), ImportError(), AssertionError("shape")])
def test_rivals_that_fail_are_told_and_ours_end_the_run(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setattr(gpu_linear, "captured", lambda calls: lambda: float(len(calls)))
    runs = lambda x: iter([lambda: x] * 9)  # noqa: E731
    x, sizes = torch.zeros(1), dict.fromkeys(("bf16", "resq", "marlin"), gpu_linear.POOL_BYTES // 3)
    measured, refused = gpu_linear.measure_cell({"bf16": runs, "resq": runs, "marlin": refuse(error)}, sizes, x, 3)
    assert measured.rounds == {"bf16": [4.0] * 3, "resq": [4.0] * 3}
    (said,) = refused.values()
    assert said.startswith(type(error).__name__)
    assert "\n" not in said
    for ours in ("bf16", "resq"):
        with pytest.raises(type(error)):
            gpu_linear.measure_cell({"bf16": runs, "marlin": runs} | {ours: refuse(error)}, sizes, x, 3)


class Device:
    """What torch says of a GPU."""

    name, major, multi_processor_count = "GPU", 9, 132


def test_run_ends_where_ours_cannot_be_built_and_goes_on_where_a_rival_cannot(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    known = contenders()
    entries = {"resq": known["resq"], "bf16": known["bf16"], "marlin": known["marlin"]}
    entries = {name: replace(entry, build=lambda shape: lambda x: iter([lambda: x])) for name, entry in entries.items()}
    entries["marlin"] = replace(entries["marlin"], build=refuse(TypeError("no such argument")))
    monkeypatch.setattr(gpu_contenders, "contenders", lambda: entries)
    monkeypatch.setattr(gpu_linear, "missing", lambda: None)
    monkeypatch.setattr(gpu_linear, "measured_ceilings", lambda: {"bytes": 1e12, "int8": 1e15, "bf16": 1e15})
    monkeypatch.setattr(gpu_linear, "captured", lambda calls: lambda: 1e4)
    monkeypatch.setattr(quantized_linear, "cuda_kernel", lambda *arguments: "decode_m8_n32")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Device)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    randn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *shape, device=None, dtype=None: randn(*shape, dtype=dtype))
    report = tmp_path / "linear.json"
    run: dict[str, Any] = {"model": "70B", "tokens": [1], "rounds": 3, "check": False, "check_only": False}
    gpu_linear.main(report, layer=["o"], contender=None, **run)
    found = json.loads(report.read_text())
    assert [row["contender"] for row in found["rows"]] == ["resq", "bf16"]
    assert [row["quartiles_us"] for row in found["rows"]] == [[100.0, 100.0]] * 2
    assert {row["layer"] for row in found["rows"]} == {"70B o"}
    assert found["unavailable"] == {"marlin": "TypeError: no such argument"}
    entries["resq"] = replace(entries["resq"], build=refuse(RuntimeError("no memory")))
    with pytest.raises(RuntimeError, match="no memory"):
        gpu_linear.main(report, layer=["o"], contender=None, **run)


@pytest.mark.parametrize("wrong", [[], ["decode_m8_n32 x1 differs"]])
def test_check_says_how_many_cases_it_compared(
    wrong: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_linear, "missing", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Device)
    monkeypatch.setattr(gpu_checks, "failures", lambda major: wrong)
    with pytest.raises(typer.Exit) as ended:
        gpu_linear.main(None, layer=None, tokens=None, contender=None, check_only=True)
    assert ended.value.exit_code == len(wrong)
    compared = len(list(cases(9)))
    assert counts(capsys.readouterr().out) == {"passed": compared - len(wrong), "failed": len(wrong), "skipped": 0}


def test_table_names_the_kernel() -> None:
    line = {"layer": "8B o", "M": 1, "contender": "resq", "median_us": 4.0, "ratio_to_bf16": 2.5, "gb_s": 2000.0}
    view = table([line | {"top_s": 1.0, "fraction": 0.5, "kernel": "decode_m8_n32 x2"}])
    assert view.row_count == 1
