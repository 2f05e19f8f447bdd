"""Running sums equal the direct product, merge and survive a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offline.calibrate.moments import SecondMoments
from resq_vllm.errors import ResQError


@settings(deadline=None, max_examples=25)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5), d=st.integers(1, 8), seed=st.integers(0, 999))
def test_sum_does_not_depend_on_the_batches(sizes: list[int], d: int, seed: int) -> None:
    x = torch.randn(sum(sizes), d, generator=torch.Generator().manual_seed(seed)) + 2
    moments, merged = SecondMoments(d), SecondMoments(d)
    for part in x.split(sizes):
        moments.update(part)
        one = SecondMoments(d)
        one.update(part[None])
        merged.merge(one)
    direct = x.double().T @ x.double()
    torch.testing.assert_close(moments.sum, direct, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(merged.sum, direct, rtol=1e-13, atol=1e-13)
    assert moments.tokens == merged.tokens == len(x)
    mean = moments.mean
    assert torch.equal(mean, mean.T)
    torch.testing.assert_close(mean, direct / len(x))


def test_sum_per_head() -> None:
    x = torch.randn(3, 7, 4)
    moments = SecondMoments(4, heads=3)
    moments.update(x[:, :5])
    moments.update(x[:, 5:])
    for head in range(3):
        torch.testing.assert_close(moments.sum[head], x[head].double().T @ x[head].double())
    assert moments.tokens == 7


def test_float64_keeps_what_float32_would_lose() -> None:
    moments = SecondMoments(1)
    for value in (4096.0, 1.0):
        moments.update(torch.tensor([[value]]))
    assert float(moments.sum) == 4096.0**2 + 1.0


def test_file(tmp_path: Path) -> None:
    moments = SecondMoments(4, heads=2)
    moments.update(torch.randn(2, 5, 4))
    moments.save(tmp_path / "m.safetensors")
    loaded = SecondMoments.load(tmp_path / "m.safetensors")
    assert torch.equal(loaded.sum, moments.sum)
    assert loaded.tokens == 5
    loaded.update(torch.ones(2, 1, 4))
    assert loaded.tokens == 6


@pytest.mark.parametrize("shape", [(5, 3), (2, 5, 3), (3, 5, 4), (5, 4)])
def test_wrong_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ResQError, match="do not fit"):
        SecondMoments(4, heads=2).update(torch.zeros(shape))


def test_merge_of_another_size() -> None:
    with pytest.raises(ResQError, match="cannot be added"):
        SecondMoments(4).merge(SecondMoments(5))


def test_mean_before_any_token() -> None:
    with pytest.raises(ResQError, match="without a single token"):
        _ = SecondMoments(4).mean
