"""The low-rank correction: optimal in the scaled norm (Eckart and Young), exact at full rank, by independent numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offline.calibrate.channels import ChannelMagnitudes
from offline.quantize.lowrank import activation_scale, low_rank
from resq_vllm.errors import ResQError


def problem(rows: int, columns: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(W, Ŵ, s) of a linear with ``rows`` outputs and ``columns`` inputs."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=g)
    scale = activation_scale(torch.rand(columns, generator=g) * 3)
    return weight, weight + 0.1 * torch.randn(rows, columns, generator=g), scale


@given(
    rows=st.integers(1, 24),
    columns=st.integers(1, 24),
    rank=st.integers(0, 30),
    scaled=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_error_is_the_sum_of_the_dropped_singular_values(
    rows: int, columns: int, rank: int, scaled: bool, seed: int
) -> None:
    weight, quantized, s = problem(rows, columns, seed)
    found = low_rank(weight, quantized, rank, s if scaled else None)
    assert (found.a.shape, found.b.shape, found.rank) == ((columns, rank), (rank, rows), rank)
    diagonal = np.diag(s.double().numpy()) if scaled else np.eye(columns)
    error = (weight - quantized).double().numpy().T
    dropped = np.linalg.svd(diagonal @ error, compute_uv=False)[rank:]
    left = diagonal @ (error - found.a.double().numpy() @ found.b.double().numpy())
    assert np.linalg.norm(left) == pytest.approx(np.linalg.norm(dropped), abs=1e-5)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(9, 20), (20, 9)])
def test_full_rank_reproduces_the_weight(rows: int, columns: int, scaled: bool) -> None:
    weight, quantized, s = problem(rows, columns, 3)
    found = low_rank(weight, quantized, 9, s if scaled else None)
    torch.testing.assert_close(quantized + found.weight(), weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("rows", "columns"), [(9, 20), (20, 9)])
def test_factors_are_those_of_the_paper(rows: int, columns: int) -> None:
    """A = diag(s)⁻¹·U_k with orthonormal U_k, B = Σ_k·V_kᵀ with falling rows."""
    weight, quantized, s = problem(rows, columns, 4)
    found = low_rank(weight, quantized, 5, s)
    u = s[:, None] * found.a
    torch.testing.assert_close(u.T @ u, torch.eye(5), rtol=0, atol=1e-5)
    gram = found.b @ found.b.T
    sigma = np.linalg.svd((s[:, None] * (weight - quantized).T).numpy(), compute_uv=False)[:5]
    torch.testing.assert_close(gram, torch.diag(torch.tensor(sigma) ** 2), rtol=1e-4, atol=1e-5)


def test_scale_lowers_the_error_of_the_outputs_it_was_measured_on() -> None:
    """What L²QER is for: inputs with unlike channels."""
    g = torch.Generator().manual_seed(5)
    x = torch.randn(400, 32, generator=g) * torch.logspace(-2, 1, 32)
    weight, quantized, _ = problem(24, 32, 5)
    magnitude = ChannelMagnitudes.empty(32, torch.device("cpu"))
    magnitude.update(x)
    corrections = (low_rank(weight, quantized, 4), low_rank(weight, quantized, 4, activation_scale(magnitude.mean)))
    plain, scaled = (float((x @ (quantized + c.weight() - weight).T).norm()) for c in corrections)
    assert scaled < 0.7 * plain


def test_an_exact_weight_needs_no_correction() -> None:
    weight = torch.randn(8, 6)
    found = low_rank(weight, weight, 3, torch.ones(6))
    assert not found.weight().any()


def test_statistic_is_the_largest_batch_mean() -> None:
    magnitude = ChannelMagnitudes.empty(2, torch.device("cpu"))
    magnitude.update(torch.tensor([[[1.0, -4.0], [3.0, 0.0]]]))
    magnitude.update(torch.tensor([[1.0, -3.0]]))
    assert magnitude.mean.tolist() == [2.0, 3.0]


def test_scale_is_clamped_and_normalised() -> None:
    s = activation_scale(torch.tensor([0.0, 1e-2, 1.0]))
    assert s.tolist() == pytest.approx([1e-2, 1.0, 100.0])


def test_dead_channels_everywhere_leave_a_scale_of_one() -> None:
    assert activation_scale(torch.zeros(4)).tolist() == pytest.approx([1.0] * 4)


def test_infinite_weights_name_the_layer() -> None:
    with pytest.raises(ResQError, match="o_proj: the weight or its calibration magnitudes are not finite"):
        low_rank(torch.full((2, 2), torch.inf), torch.zeros(2, 2), 1, name="o_proj")
