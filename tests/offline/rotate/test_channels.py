"""The order of down_proj's channels: a permutation that deals the strong ones out evenly, and changes nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offline.models.runner import LayerRunner
from offline.models.source import ModelSource
from offline.rotate.channels import channel_order, permute_down, zigzag
from tests.offline.models.tiny import save_tiny


def test_zigzag_worked_by_hand() -> None:
    assert zigzag(torch.arange(9), 3).tolist() == [[0, 5, 6], [1, 4, 7], [2, 3, 8]]


@given(
    groups=st.sampled_from([1, 2, 4]),
    low_blocks=st.integers(1, 5),
    high_blocks=st.integers(0, 2),
    block=st.sampled_from([2, 4, 12]),
    seed=st.integers(0, 99),
)
def test_high_channels_are_the_strongest_and_blocks_are_balanced(
    groups: int, low_blocks: int, high_blocks: int, block: int, seed: int
) -> None:
    high, size = high_blocks * block, (low_blocks + high_blocks) * block
    energy = torch.rand(groups * size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    order = channel_order(energy, groups, high, block)
    assert order.sort().values.tolist() == list(range(groups * size))
    by_group = energy[order].view(groups, size)
    low, strong = by_group[:, : size - high], by_group[:, size - high :]
    if high:
        assert float(strong.min()) >= float(low.max())
    # Dealt back and forth, hands differ by no more than the spread of the cards.
    hands = low.reshape(-1, block).sum(1)
    assert float(hands.max() - hands.min()) <= float(low.max() - low.min()) + 1e-12


@pytest.mark.parametrize("family", ["llama-bias", "qwen2"])
def test_permuted_layer_is_the_same_function(family: str, tmp_path: Path) -> None:
    save_tiny(family, tmp_path)
    runner = LayerRunner(ModelSource.open(str(tmp_path)))
    order = torch.randperm(runner.adapter.intermediate_size, generator=torch.Generator().manual_seed(0))
    tensors = runner.source.layer_tensors(0)
    hidden = torch.randn(2, 7, runner.adapter.hidden_size, generator=torch.Generator().manual_seed(1))
    plain = runner.layer(0, tensors).forward(hidden)
    moved = runner.layer(0, permute_down(tensors, runner.adapter, 0, order)).forward(hidden)
    torch.testing.assert_close(moved, plain, rtol=1e-4, atol=1e-4)
