"""The memory that a run needed, said at its end."""

from __future__ import annotations

import resource


def peak_memory() -> float:
    """Largest resident size of this process so far, in GiB (Linux counts it in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
