"""The symmetric quantizer and its clip search."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offline.quantize import weights as module
from offline.quantize.weights import clip_ratios, code_range, symmetric_codes, symmetric_scale


def brute_force(row: torch.Tensor, bits: int) -> float:
    """The scale with the least Σ|Ŵ − W|^2.4, one candidate after the other, the largest ratio first."""
    smallest, largest = code_range(bits)
    full = row.abs().max() / largest
    best, best_error = full, torch.tensor(torch.inf)
    for ratio in clip_ratios():
        scale = full * ratio
        restored = (row / scale).round().clamp(smallest, largest) * scale
        error = ((restored - row).abs() ** 2.4).sum()
        if error < best_error:
            best, best_error = scale, error
    return float(best)


def test_candidates_run_from_1_to_0_21() -> None:
    ratios = clip_ratios()
    assert (len(ratios), ratios[0]) == (80, 1.0)
    assert ratios[-1] == pytest.approx(0.21)


@pytest.mark.parametrize("bits", [4, 8])
def test_clip_search_equals_brute_force(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    weight = torch.randn(33, 40) ** 3
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 40 * 7)  # several chunks, the last one short
    expected = torch.tensor([brute_force(row, bits) for row in weight])
    torch.testing.assert_close(symmetric_scale(weight, bits), expected, rtol=1e-6, atol=0)


def test_clip_search_clips_an_outlier() -> None:
    torch.manual_seed(0)
    weight = torch.randn(1, 4096)
    weight[0, 0] = 8.0
    assert symmetric_scale(weight, 4).item() < 0.8 * symmetric_scale(weight, 4, clip=False).item()


def test_scale_without_clip_is_absmax_over_largest_code() -> None:
    assert symmetric_scale(torch.tensor([[0.5, -3.5]]), 4, clip=False).tolist() == [0.5]


def test_row_of_zeros_has_codes_of_zero() -> None:
    weight = torch.zeros(2, 6)
    scale = symmetric_scale(weight, 4)
    assert scale.tolist() == [1.0, 1.0]
    assert symmetric_codes(weight, scale, 4).abs().sum() == 0


def test_ties_round_to_even_and_codes_are_clamped() -> None:
    weight = torch.tensor([[0.5, 1.5, 2.5, -0.5, 99.0, -99.0]])
    assert symmetric_codes(weight, torch.ones(1), 4).tolist() == [[0, 2, 2, 0, 7, -8]]


@given(seed=st.integers(0, 2**31), bits=st.sampled_from([4, 8]), columns=st.integers(1, 40))
def test_unclipped_error_is_at_most_half_a_step(seed: int, bits: int, columns: int) -> None:
    weight = torch.randn(3, columns, generator=torch.Generator().manual_seed(seed))
    scale = symmetric_scale(weight, bits, clip=False)
    restored = symmetric_codes(weight, scale, bits) * scale[:, None]
    assert bool(((restored - weight).abs() <= scale[:, None] * 0.50001).all())
