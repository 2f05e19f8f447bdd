"""How down_proj's input is cut, for real and awkward FFN widths."""

from __future__ import annotations

import pytest

from offline.rotate.spec import down_layout
from resq_vllm.errors import ResQError
from resq_vllm.hadamard import hadamard_order

REAL = [14336, 28672, 3072, 8192, 11008, 13824, 27648, 8960, 5632, 18944, 4864, 9728, 29568, 17408, 25600]


@pytest.mark.parametrize("width", REAL)
@pytest.mark.parametrize("max_tp", [1, 2, 4, 8])
def test_published_models_have_eight_groups_with_a_high_part(width: int, max_tp: int) -> None:
    layout = down_layout(width, 1 / 8, max_tp)
    assert layout.groups == 8
    assert 0.1 < 8 * layout.high / width <= 1 / 8
    size = width // 8
    assert size % layout.block == 0
    assert layout.high % layout.block == 0
    assert hadamard_order(layout.block) >= 1


@pytest.mark.parametrize(
    ("width", "block", "high"),
    [
        (14336, 32, 224),  # 1792 = 56·32, and 224 = 7·32; 64 would leave 192 high channels
        (11008, 32, 160),  # 1376 = 43·32
        (4864, 76, 76),  # 608 = 8·76: no power of two from 16 on leaves more than 64 of the 76
        (768, 12, 12),
        (512, 8, 8),
    ],
)
def test_block_is_a_wide_power_of_two_where_the_high_part_allows(width: int, block: int, high: int) -> None:
    layout = down_layout(width, 1 / 8)
    assert (layout.block, layout.high, layout.hadamard_groups) == (block, high, width // block)


@pytest.mark.parametrize("width", REAL)
def test_without_high_part_blocks_are_groups(width: int) -> None:
    layout = down_layout(width, 0)
    assert (layout.groups, layout.high, layout.block) == (8, 0, width // 8)


@pytest.mark.parametrize(
    ("width", "max_tp", "preferred", "groups"),
    [
        (512, 1, 8, 8),
        (512, 16, 8, 16),
        (512, 1, 1, 1),
        (36, 1, 8, 3),  # 36/6 = 6 and 36/4 = 9 have no Hadamard matrix, 36/3 = 12 has
        (36, 1, 2, 1),
        (96, 3, 8, 6),  # 96/6 = 16; 8 is no multiple of 3
    ],
)
def test_awkward_widths(width: int, max_tp: int, preferred: int, groups: int) -> None:
    assert down_layout(width, 1 / 8, max_tp, preferred).groups == groups


def test_group_too_narrow_for_the_high_part_has_none() -> None:
    assert down_layout(32, 1 / 8).high == 0


@pytest.mark.parametrize(("width", "max_tp"), [(36, 2), (512, 3), (12 * 7, 8), (18, 4)])
def test_no_block_size_is_one_sentence(width: int, max_tp: int) -> None:
    with pytest.raises(ResQError, match=rf"intermediate_size {width} has no block Hadamard for max-tp {max_tp}"):
        down_layout(width, 1 / 8, max_tp)


@pytest.mark.parametrize(("max_tp", "preferred"), [(0, 8), (1, 0)])
def test_counts_below_one(max_tp: int, preferred: int) -> None:
    with pytest.raises(ResQError, match="at least 1"):
        down_layout(512, 1 / 8, max_tp, preferred)
