"""Number of Hadamard blocks for real and awkward FFN widths."""

from __future__ import annotations

import pytest

from offline.rotate.spec import hadamard_groups
from resq_vllm.errors import ResQError
from resq_vllm.hadamard import hadamard_order

REAL = [14336, 28672, 3072, 8192, 11008, 13824, 27648, 8960, 5632, 18944, 4864, 9728, 29568, 17408, 25600]


@pytest.mark.parametrize("width", REAL)
@pytest.mark.parametrize("max_tp", [1, 2, 4, 8])
def test_published_models_have_eight_blocks(width: int, max_tp: int) -> None:
    assert hadamard_groups(width, max_tp) == 8
    assert hadamard_order(width // 8) >= 1


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
    assert hadamard_groups(width, max_tp, preferred) == groups


@pytest.mark.parametrize(("width", "max_tp"), [(36, 2), (512, 3), (12 * 7, 8), (9, 1)])
def test_no_block_size_is_one_sentence(width: int, max_tp: int) -> None:
    if width == 9:
        assert hadamard_groups(width, max_tp, 9) == 9  # blocks of one column: the identity
        width, max_tp = 18, 4
    with pytest.raises(ResQError, match=rf"intermediate_size {width} has no block Hadamard for max-tp {max_tp}"):
        hadamard_groups(width, max_tp)


@pytest.mark.parametrize(("max_tp", "preferred"), [(0, 8), (1, 0)])
def test_counts_below_one(max_tp: int, preferred: int) -> None:
    with pytest.raises(ResQError, match="at least 1"):
        hadamard_groups(512, max_tp, preferred)
