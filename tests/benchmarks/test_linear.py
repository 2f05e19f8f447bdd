"""The linear benchmark: arguments, row maths, pool, table."""

from __future__ import annotations

import pytest
import torch
import typer

from benchmarks import linear
from benchmarks.ceilings import Ceilings
from benchmarks.linear_contenders import contenders
from benchmarks.pairs import Comparison

CEILINGS = Ceilings(dram_gb_s=10.0, int8_top_s=2.0, bf16_top_s=1.0)
FIELDS = {"M", "N", "K", "contender", "median_ms", "ratio_to_bf16", "gb_s", "top_s", "fraction"}


@pytest.mark.parametrize("text", ["4096", "4096,4096,1", "a,b", "4096x4096"])
def test_shape_that_is_no_pair_of_numbers(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="is not two numbers N,K"):
        linear.parse_shape(text)


@pytest.mark.parametrize("text", ["100,2048", "64,2047", "-64,1024", "0,1024"])
def test_shape_that_no_tile_fits(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="N must be a positive multiple of 64"):
        linear.parse_shape(text)


def test_bf16_always_takes_part() -> None:
    known = contenders()
    assert list(linear.chosen(["resq"], known)) == ["resq", "bf16", "bf16-vllm"]
    assert list(linear.chosen(None, known)) == list(known)
    with pytest.raises(typer.BadParameter, match="--contender fast is not known; known are resq, "):
        linear.chosen(["resq", "fast"], known)


def test_down_projs_recipe_is_for_layers_wider_at_their_input() -> None:
    assert linear.suits("resq-down", 2048, 8192)
    assert not linear.suits("resq-down", 4096, 4096)
    assert linear.suits("resq", 4096, 4096)


def test_row_of_a_compute_bound_cell() -> None:
    measured = Comparison("bf16-vllm", {"resq": [200.0, 100.0, 400.0], "bf16-vllm": [100.0, 100.0, 100.0]})
    line = linear.row((1000, 1000, 1000), "resq", contenders()["bf16"], measured, CEILINGS)
    assert set(line) >= FIELDS
    assert (line["M"], line["N"], line["K"], line["bf16_path"]) == (1000, 1000, 1000, "bf16-vllm")
    assert line["median_ms"] == 5.0
    assert line["ratio_to_bf16"] == 2.0
    assert line["gb_s"] == 0.4
    assert line["top_s"] == 0.4
    # 2·10^9 bf16 operations at 10^12 a second take 2 ms.
    assert (line["fraction"], line["bound"]) == (0.4, "compute")


def test_pool_has_equally_many_copies_and_names_what_is_missing() -> None:
    names = ("resq", "bf16", "zentorch-w8a8")
    known = {name: contenders()[name] for name in names}
    pool, missing = linear.build_pool(known, 64, 1024, 2**20)
    expected = 2**20 // sum(known[name].weight_bytes(64, 1024) for name in pool)
    assert {len(copies) for copies in pool.values()} == {expected}
    assert set(pool) | set(missing) == set(names)
    assert all(reason.startswith("zentorch") for reason in missing.values())
    measured = linear.measure_cell(pool, torch.randn(2, 1024).bfloat16(), 2, 0.0)
    rows = [linear.row((2, 64, 1024), name, known[name], measured, CEILINGS) for name in pool]
    assert linear.table(rows).row_count == len(pool)
