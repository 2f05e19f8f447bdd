"""Contenders of the linear benchmark compute x·Wᵀ, and say why they cannot be measured."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from benchmarks.linear_contenders import (
    LARGEST_ERROR,
    Linear,
    UnavailableError,
    checked,
    contenders,
    resq_plan,
    symmetric_codes,
)

# zentorch is no dependency of the project.
OURS_AND_STOCK = [name for name in contenders() if not name.startswith("zentorch")]
MADE_FOR_AMX = ("w8a8-amx", "int4_scaled_mm_cpu")
WEIGHT = torch.randn(128, 1024, generator=torch.Generator().manual_seed(5)).bfloat16()


@pytest.mark.parametrize("name", OURS_AND_STOCK)
def test_contender_computes_the_product_or_says_why_not(name: str) -> None:
    if name in MADE_FOR_AMX and not torch.cpu._is_amx_tile_supported():
        with pytest.raises(UnavailableError, match="AMX"):
            checked(name, contenders()[name], WEIGHT)
        return
    calls, error = checked(name, contenders()[name], WEIGHT)
    assert error < LARGEST_ERROR
    copies = list(itertools.islice(calls, 2))
    x = torch.randn(3, 1024).bfloat16()
    assert torch.equal(copies[0](x), copies[1](x))
    assert copies[0](x).shape == (3, 128)


def test_contender_that_computes_something_else_is_not_measured() -> None:
    def wrong(weight: torch.Tensor) -> Iterator[Linear]:
        yield lambda x: -x @ weight.t()

    with pytest.raises(UnavailableError, match=r"bf16 computes something else here: relative error 2\.00"):
        checked("bf16", replace(contenders()["bf16"], build=wrong), WEIGHT)


def test_contender_whose_op_refuses_is_not_measured() -> None:
    def refusing(weight: torch.Tensor) -> Iterator[Linear]:
        raise RuntimeError("K must be a multiple of 7\nstack")

    with pytest.raises(UnavailableError, match=r"^K must be a multiple of 7$"):
        checked("bf16", replace(contenders()["bf16"], build=refusing), WEIGHT)


def test_sites_are_those_of_the_default_recipe() -> None:
    plan, low_bits = resq_plan("qkv", 2048)
    assert (plan.part_columns, low_bits, plan.hadamard_groups) == ((1792, 256), 4, 0)
    plan, _ = resq_plan("down", 8192)
    assert sum(plan.part_columns) == 8192
    assert plan.hadamard_groups > 0


def test_weight_bytes_are_those_of_the_packed_weight() -> None:
    # 7/8 of the columns at 4 bits, 1/8 at 8; two scales, two column sums.
    assert contenders()["resq"].weight_bytes(64, 1024) == 64 * (448 + 128 + 16)
    assert contenders()["bf16"].weight_bytes(64, 1024) == 64 * 2048


def test_codes_round_to_nearest_per_group() -> None:
    weight = torch.tensor([[7.0, -3.6, 0.4, 70.0, 36.0, 0.0]])
    codes, scale = symmetric_codes(weight, 4, group=3)
    assert codes.tolist() == [[7, -4, 0, 7, 4, 0]]
    assert scale.tolist() == [[1.0, 10.0]]
