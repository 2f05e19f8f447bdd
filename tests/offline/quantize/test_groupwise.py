"""Group-wise symmetric weights against a loop over groups."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offline.quantize.groupwise import expand_scale, fitting_group, groupwise


@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 40),
    group=st.integers(1, 45),
    bits=st.sampled_from([4, 8]),
    seed=st.integers(0, 2**31),
)
def test_equals_a_loop(rows: int, columns: int, group: int, bits: int, seed: int) -> None:
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    q = groupwise(w, group, bits)
    levels = 2 ** (bits - 1)
    assert q.scale.shape == (rows, -(-columns // group))
    for g, start in enumerate(range(0, columns, group)):
        part = w[:, start : start + group]
        for row in range(rows):
            peak = max(part[row].tolist(), key=abs)
            scale = torch.tensor(peak) / -levels
            codes = (part[row] / scale).round().clamp(-levels, levels - 1)
            assert torch.equal(q.scale[row, g], scale)
            assert torch.equal(q.codes[row, start : start + group].float(), codes)
            assert torch.equal(q.dequantize()[row, start : start + group], codes * scale)


def test_worked_by_hand() -> None:
    q = groupwise(torch.tensor([[8.0, -3.5, 2.5, -0.8, 0.06]]), group=3)
    # s = −1: 3.5 and −2.5 round half to even. The last group is shorter: s = 0.1.
    assert q.codes.tolist() == [[-8, 4, -2, -8, 1]]
    assert q.scale.tolist() == [[-1.0, pytest.approx(0.1)]]


def test_largest_magnitude_is_exact_and_the_other_sign_is_clamped() -> None:
    q = groupwise(torch.tensor([[8.0, -8.0, 1.0, -7.4]]))
    assert q.dequantize().tolist() == [[8.0, -7.0, 1.0, -7.0]]


def test_a_group_of_zeros_has_codes_0_and_stays_finite() -> None:
    q = groupwise(torch.tensor([[0.0, 0.0, 1.0, 2.0]]), group=2)
    assert q.codes.tolist()[0][:2] == [0, 0]
    assert q.dequantize().isfinite().all()


def test_scale_of_every_column() -> None:
    assert expand_scale(torch.tensor([[1.0, 2.0]]), 3, 5).tolist() == [[1.0, 1.0, 1.0, 2.0, 2.0]]


@pytest.mark.parametrize(("columns", "group"), [(4096, 128), (192, 96), (512, 128), (64, 64), (96, 96), (97, 97)])
def test_group_is_cut_to_a_divisor(columns: int, group: int) -> None:
    assert fitting_group(columns) == group


def test_a_prime_width_leaves_groups_of_one() -> None:
    assert fitting_group(257) == 1
