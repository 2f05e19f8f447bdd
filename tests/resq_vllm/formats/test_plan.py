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
    assert plan.runs == (Run(0, 0, 0, 224, 0), Run(1, 1, 0, 32, 1))
    assert plan.group_bits == (4, 8)
    assert plan.flat_segments() == [224, 0, 0, 32, 1, 1]


def test_one_scale_over_interleaved_heads_needs_two_runs() -> None:
    plan = linear_plan(out_site("token", 8), 256, 64)
    assert plan.runs == (Run(0, 0, 0, 224, 0), Run(1, 0, 0, 32, 1))
    assert plan.group_bits == (8,)
    assert plan.part_index(1)[:9] == [*range(56, 64), 120]


def test_paper_mode_has_two_runs_a_head() -> None:
    plan = linear_plan(out_site("head", 4), 128, 64)
    assert plan.runs == (Run(0, 0, 0, 56, 0), Run(1, 1, 0, 8, 1), Run(0, 2, 56, 56, 0), Run(1, 3, 8, 8, 1))


def test_part_scales_over_heads() -> None:
    assert linear_plan(out_site("part", 4), 256, 64).runs == (Run(0, 0, 0, 224, 0), Run(1, 1, 0, 32, 1))


@pytest.mark.parametrize("share", [1, 2, 4, 8])
def test_hadamard_blocks_do_not_depend_on_the_ranks(share: int) -> None:
    plan = linear_plan(DOWN, 768 // share, 64)
    assert plan.hadamard_groups == 8 // share
    assert all(run.length == 96 for run in plan.runs)
    assert plan.hadamard_k == 12


def test_blocks_with_a_high_part() -> None:
    plan = linear_plan(LinearSite(low=48, high=16, scales="block", hadamard_groups=2), 64, 64)
    assert plan.runs == (Run(0, 0, 0, 24, 0), Run(1, 2, 0, 8, 1), Run(0, 1, 24, 24, 0), Run(1, 3, 8, 8, 1))
    assert plan.group_bits == (4, 4, 8, 8)


def test_scale_blocks_of_several_hadamard_blocks() -> None:
    site = LinearSite(low=96, high=32, scales="block", scale_groups=2, hadamard_groups=8)
    plan = linear_plan(site, 128, 64)
    assert plan.runs == (Run(0, 0, 0, 48, 0), Run(1, 2, 0, 16, 1), Run(0, 1, 48, 48, 0), Run(1, 3, 16, 16, 1))
    assert plan.hadamard_groups == 8
    half = linear_plan(site, 64, 64)
    assert (half.runs, half.hadamard_groups) == ((Run(0, 0, 0, 48, 0), Run(1, 1, 0, 16, 1)), 4)


def test_scale_blocks_without_a_hadamard() -> None:
    plan = linear_plan(LinearSite(low=96, high=0, scales="block", scale_groups=3, weight_group=32), 96, 64)
    assert plan.runs == (Run(0, 0, 0, 32, 0), Run(0, 1, 32, 32, 1), Run(0, 2, 64, 32, 2))
    assert (plan.hadamard_groups, plan.group_bits, plan.scale_rows) == (0, (4, 4, 4), 4)


def test_scale_blocks_of_whole_heads() -> None:
    site = LinearSite(low=224, high=32, scales="block", scale_groups=2, order="heads")
    plan = linear_plan(site, 256, 64)
    assert plan.runs == (Run(0, 0, 0, 112, 0), Run(1, 1, 0, 16, 1), Run(0, 2, 112, 112, 0), Run(1, 3, 16, 16, 1))
    assert plan.group_bits == (4, 8, 4, 8)
    assert linear_plan(site, 128, 64).runs == (Run(0, 0, 0, 112, 0), Run(1, 1, 0, 16, 1))
    # More ranks than blocks: every rank's heads have scales of their own.
    assert linear_plan(site, 64, 64).runs == (Run(0, 0, 0, 56, 0), Run(1, 1, 0, 8, 1))


def test_scale_blocks_that_cut_a_head_or_straddle_ranks_are_refused() -> None:
    with pytest.raises(ResQError, match="scale_groups = 8 does not divide 4 heads"):
        linear_plan(LinearSite(low=224, high=32, scales="block", scale_groups=8, order="heads"), 256, 64)
    eighteen = LinearSite(low=504, high=72, scales="block", scale_groups=3, order="heads")
    with pytest.raises(ResQError, match="a rank's 9 heads hold no whole number of scale blocks of 6 heads"):
        linear_plan(eighteen, 288, 32)


def test_scale_blocks_of_high_columns_only() -> None:
    plan = linear_plan(LinearSite(low=0, high=64, scales="block", scale_groups=2), 64, 64)
    assert (plan.runs, plan.group_bits) == ((Run(1, 0, 0, 32, 1), Run(1, 1, 32, 32, 1)), (8, 8))


def test_weight_groups_cut_the_runs_of_one_activation_scale() -> None:
    plan = linear_plan(LinearSite(low=96, high=32, scales="token", act_low_bits=8, weight_group=48), 128, 64)
    assert plan.runs == (Run(0, 0, 0, 48, 0), Run(0, 0, 48, 48, 1), Run(1, 0, 0, 32, 2))
    assert plan.group_bits == (8,)
    assert plan.flat_segments() == [96, 0, 0, 32, 1, 0]


def test_weight_groups_span_heads_and_segments_end_groups() -> None:
    site = out_site("head", 4).model_copy(update={"weight_group": 28})
    assert linear_plan(site, 128, 64).runs[:3] == (Run(0, 0, 0, 28, 0), Run(0, 0, 28, 28, 1), Run(1, 1, 0, 8, 4))
    wide = out_site("token", 8).model_copy(update={"weight_group": 112})
    assert linear_plan(wide, 256, 64).runs == (Run(0, 0, 0, 112, 0), Run(1, 0, 0, 32, 2), Run(0, 0, 112, 112, 1))


@pytest.mark.parametrize("share", [1, 2])
def test_weight_groups_per_rank(share: int) -> None:
    plan = linear_plan(LinearSite(low=256, high=0, scales="token", weight_group=64), 256 // share, 64)
    assert [run.scale_row for run in plan.runs] == list(range(4 // share))


def test_weight_groups_that_straddle_ranks_are_refused() -> None:
    with pytest.raises(ResQError, match=r"weight_group = 64 does not divide the 32 low columns.* --max-tp 8"):
        linear_plan(LinearSite(low=256, high=0, scales="token", weight_group=64), 32, 64)


def test_scale_groups_that_do_not_divide_by_the_ranks_are_refused() -> None:
    with pytest.raises(ResQError, match=r"scale_groups = 2 does not divide by the tensor-parallel degree 4"):
        linear_plan(LinearSite(low=256, high=0, scales="block", scale_groups=2, hadamard_groups=8), 64, 64)


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
