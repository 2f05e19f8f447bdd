"""How down_proj's input is cut: scale groups, the high channels of each, and the blocks of the online Hadamard."""

from __future__ import annotations

from dataclasses import dataclass

from resq_vllm.errors import ResQError
from resq_vllm.hadamard import hadamard_order

DEFAULT_GROUPS = 8
# A block may leave this share of the high channels that were asked for unused, to be wider or cheaper.
_ENOUGH = 0.9
_WIDEST_ODD = 128
# Narrower blocks spread nothing.
_NARROWEST = 4


@dataclass(frozen=True)
class DownLayout:
    """f = groups·[low | high] channels under blocks of ``block`` channels.

    Attributes:
        width: f.
        groups: equal groups with an activation scale for each part; tensor-parallel ranks take whole ones.
        high: high channels of a group, a multiple of ``block`` (0: no high part, one block a group).
        block: width of a Hadamard block.

    """

    width: int
    groups: int
    high: int
    block: int

    @property
    def hadamard_groups(self) -> int:
        """Blocks of the whole input."""
        return self.width // self.block


def down_layout(width: int, fraction: float, max_tp: int = 1, preferred: int = DEFAULT_GROUPS) -> DownLayout:
    """The layout for FFN width f = ``width`` with at most ``fraction`` of the channels high.

    ``preferred`` groups where f/G has a known Hadamard order, else the largest smaller divisor of f that has; always a
    multiple of ``max_tp`` (so with max_tp above ``preferred``, as many as that). Blocks are the widest power of two
    from 16 on that leaves nine tenths of the high channels asked for (a butterfly costs log2 additions a channel, a
    block k·2^m k more), else the widest block with a known order. Without high channels: one block a group.

    Raises ResQError when no grouping has a block Hadamard.
    """
    groups = _groups(width, max_tp, preferred)
    size = width // groups
    wanted = size * fraction
    found: list[tuple[int, int]] = []
    for block in range(_NARROWEST, size // 2 + 1):
        high = block * int(wanted / block + 1e-9)
        if size % block == 0 and high and _order(block):
            found.append((high, block))
    if not found:
        return DownLayout(width, groups, 0, size)
    enough = [(high, block) for high, block in found if high >= _ENOUGH * wanted]
    powers = [(block, high) for high, block in enough if block >= 16 and block & (block - 1) == 0]
    others = [(block, high) for high, block in enough if block <= _WIDEST_ODD]
    if powers or others:
        block, high = max(powers or others)
    else:
        high, block = max(found)
    return DownLayout(width, groups, high, block)


def _order(n: int) -> int:
    """The dense order k of n = k·2^m, 0 where none is known."""
    try:
        return hadamard_order(n)
    except ResQError:
        return 0


def _groups(width: int, max_tp: int, preferred: int) -> int:
    if max_tp < 1:
        raise ResQError(f"max-tp is {max_tp}; it must be at least 1")
    if preferred < 1:
        raise ResQError(f"hadamard groups is {preferred}; it must be at least 1")
    for groups in range(max(preferred, max_tp), 0, -1):
        if width % groups == 0 and groups % max_tp == 0 and _order(width // groups):
            return groups
    raise ResQError(
        f"intermediate_size {width} has no block Hadamard for max-tp {max_tp}: no number of blocks up to "
        f"{max(preferred, max_tp)} that is a multiple of {max_tp} leaves a block size with a known Hadamard matrix; "
        "lower max-tp"
    )
