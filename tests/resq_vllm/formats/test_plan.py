"""Segments, runs and groups of every kind of linear site, whole and per rank."""

from __future__ import annotations

import pytest

from resq_vllm.errors import ResQError
from resq_vllm.formats.metadata import LinearSite
from resq_vllm.formats.plan import Run, linear_plan

QKV = LinearSite(low=224, high=32)
DOWN = LinearSite(low=768, high=0, scales="block", hadamard_groups=8)


def out_site(scales: str, bits: int) -> LinearSite:
    return LinearSite.model_validate({"low": 224, "high": 32, "scales": scales, "act_low_bits": bits, "order": "heads"})


def test_split_site_has_one_run_a_part() -> None:
    plan = linear_plan(QKV, 256, 64)
    assert plan.runs == (Run(0, 0, 0, 224), Run(1, 1, 0, 32))
    assert plan.group_bits == (4, 8)
    assert plan.flat_segments() == [224, 0, 0, 32, 1, 1]


def test_one_scale_over_interleaved_heads_needs_two_runs() -> None:
    plan = linear_plan(out_site("token", 8), 256, 64)
    assert plan.runs == (Run(0, 0, 0, 224), Run(1, 0, 0, 32))
    assert plan.group_bits == (8,)
    assert plan.part_index(1)[:9] == [*range(56, 64), 120]


def test_paper_mode_has_two_runs_a_head() -> None:
    plan = linear_plan(out_site("head", 4), 128, 64)
    assert plan.runs == (Run(0, 0, 0, 56), Run(1, 1, 0, 8), Run(0, 2, 56, 56), Run(1, 3, 8, 8))


def test_part_scales_over_heads() -> None:
    assert linear_plan(out_site("part", 4), 256, 64).runs == (Run(0, 0, 0, 224), Run(1, 1, 0, 32))


@pytest.mark.parametrize("share", [1, 2, 4, 8])
def test_hadamard_blocks_do_not_depend_on_the_ranks(share: int) -> None:
    plan = linear_plan(DOWN, 768 // share, 64)
    assert plan.hadamard_groups == 8 // share
    assert all(run.length == 96 for run in plan.runs)
    assert plan.hadamard_k == 12


def test_blocks_with_a_high_part() -> None:
    plan = linear_plan(LinearSite(low=48, high=16, scales="block", hadamard_groups=2), 64, 64)
    assert plan.runs == (Run(0, 0, 0, 24), Run(1, 2, 0, 8), Run(0, 1, 24, 24), Run(1, 3, 8, 8))
    assert plan.group_bits == (4, 4, 8, 8)


def test_no_high_part_leaves_one_group() -> None:
    assert linear_plan(LinearSite(low=256, high=0), 256, 64).group_bits == (4,)


def test_blocks_that_do_not_divide_by_the_ranks_are_refused() -> None:
    three = LinearSite(low=768, high=0, scales="block", hadamard_groups=4)
    with pytest.raises(
        ResQError, match=r"hadamard_groups = 4 does not divide by the tensor-parallel degree 8.*--max-tp 8"
    ):
        linear_plan(three, 96, 64)


def test_half_a_head_is_refused() -> None:
    with pytest.raises(ResQError, match="whole heads"):
        linear_plan(out_site("token", 8), 32, 64)
