"""How the down_proj Hadamard is cut into blocks."""

from __future__ import annotations

from resq_vllm.errors import ResQError
from resq_vllm.hadamard import hadamard_order

DEFAULT_GROUPS = 8


def hadamard_groups(intermediate_size: int, max_tp: int = 1, preferred: int = DEFAULT_GROUPS) -> int:
    """Blocks G of the block-diagonal Hadamard I_G ⊗ H_{f/G} for FFN width f.

    G is ``preferred`` where f/G has a known Hadamard order, else the largest smaller divisor of f that has; always a
    multiple of ``max_tp``, since a tensor-parallel rank takes whole blocks (so with max_tp above ``preferred``, G is
    ``max_tp``). Raises ResQError when there is none.
    """
    if max_tp < 1:
        raise ResQError(f"max-tp is {max_tp}; it must be at least 1")
    if preferred < 1:
        raise ResQError(f"hadamard groups is {preferred}; it must be at least 1")
    for groups in range(max(preferred, max_tp), 0, -1):
        if intermediate_size % groups or groups % max_tp:
            continue
        try:
            hadamard_order(intermediate_size // groups)
        except ResQError:
            continue
        return groups
    raise ResQError(
        f"intermediate_size {intermediate_size} has no block Hadamard for max-tp {max_tp}: no number of blocks up to "
        f"{max(preferred, max_tp)} that is a multiple of {max_tp} leaves a block size with a known Hadamard matrix; "
        "lower max-tp"
    )
