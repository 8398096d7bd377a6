"""Memory that is freed goes back to the system, where a process is to hold no more than its share of a model."""

from __future__ import annotations

import ctypes
import os
import sys

_M_MMAP_THRESHOLD = -3  # malloc.h of glibc
_LARGE_BYTES = 1 << 20


def return_large_blocks() -> None:
    """Let glibc return blocks of 1 MiB and more when they are freed; does nothing with another C library.

    Otherwise it keeps blocks of up to 32 MiB for the thread that asked for them. Gathered layers and gradients come from
    several threads and in many sizes: of FSDP2's processes with 0.8 GB of state each, heaps took 1.1 GB more than was in use
    (benchmarks/sharding.md). A user's own MALLOC_MMAP_THRESHOLD_ stays.
    """
    if sys.platform != "linux" or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(_M_MMAP_THRESHOLD, _LARGE_BYTES)


def return_free_pages() -> None:
    """Let glibc return what lies free between blocks that are in use; does nothing with another C library."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
