"""Memory that was freed, given back to the operating system; without effect where the C library is not glibc."""

from __future__ import annotations

import ctypes
from functools import cache

LARGE_BLOCK = 1 << 20
KEPT_BLOCK, KEPT_MEMORY = 32 << 20, 256 << 20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


@cache
def _glibc(name: str) -> ctypes._NamedFuncPointer | None:
    """A function of glibc's allocator, or None where another C library keeps its own ways."""
    return getattr(ctypes.CDLL(None), name, None)


def release_freed() -> None:
    """Give memory that this process has freed back to the operating system.

    glibc keeps freed blocks of up to 32 MiB for later: a checkpoint's tensors after their layers have been re-laid.
    """
    trim = _glibc("malloc_trim")
    if trim is not None:
        trim(0)


def return_large_blocks() -> None:
    """From now on, memory blocks of 1 MiB and more go back to the operating system as soon as they are freed.

    glibc raises that size to 32 MiB as blocks are freed, and what it keeps lies in holes between blocks in use: 0.4 GiB
    beside the layers of a 1B model that is being quantized, more from layer to layer.
    """
    set_option = _glibc("mallopt")
    if set_option is not None:
        set_option(_M_MMAP_THRESHOLD, LARGE_BLOCK)


def keep_freed_blocks() -> None:
    """From now on, up to 256 MiB of freed memory are kept for the next blocks of up to 32 MiB.

    By itself glibc gives the end of the heap back whenever some 24 MiB of it are free. In a batch of 2048 prompt tokens
    the outputs of every layer then come from the system and go back to it: 8 % of the time (1B shape, 16 streams).
    """
    set_option = _glibc("mallopt")
    if set_option is not None:
        set_option(_M_MMAP_THRESHOLD, KEPT_BLOCK)
        set_option(_M_TRIM_THRESHOLD, KEPT_MEMORY)
