"""Memory that was freed, given back to the operating system."""

from __future__ import annotations

import ctypes
from functools import cache


@cache
def _malloc_trim() -> ctypes._NamedFuncPointer | None:
    """glibc's function, or None where another C library or allocator keeps its own ways."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


def release_freed() -> None:
    """Give memory that this process has freed back to the operating system, where the C library is glibc.

    glibc keeps freed blocks of up to 32 MiB for later: a checkpoint's tensors after their layers have been re-laid, or
    0.2 GiB between the linears of a 1B model that is being quantized.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)
