"""What glibc's allocator does with memory that is freed: keeps it for the next step, or returns it to the system."""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any

# Options of mallopt (malloc.h of glibc), and the variables by which a user sets them.
_TRIM_THRESHOLD = (-1, "MALLOC_TRIM_THRESHOLD_")
_TOP_PAD = (-2, "MALLOC_TOP_PAD_")
_MMAP_THRESHOLD = (-3, "MALLOC_MMAP_THRESHOLD_")

_LARGE_BYTES = 1 << 20
_HEAP_GROWTH_BYTES = 1 << 28
_MOST_BYTES = 2**31 - 1  # mallopt takes an int.


def keep_blocks() -> None:
    """Let glibc keep freed blocks for the next step; does nothing with another C library.

    By default it returns large blocks to the system and requests them again in each step, page by page: without that a
    training on a CPU is 1.1 to 1.5 times as fast.
    """
    _set_option(_MMAP_THRESHOLD, _MOST_BYTES)
    _set_option(_TRIM_THRESHOLD, _MOST_BYTES)
    _set_option(_TOP_PAD, _HEAP_GROWTH_BYTES)


def return_large_blocks() -> None:
    """Let glibc return blocks of 1 MiB and more when they are freed; does nothing with another C library.

    For the preparation of data, whose blocks training has no use for, and for a process that is to hold no more than its
    share of a model. By default blocks of up to 32 MiB are kept for the thread that asked for them. Gathered layers and
    gradients come from several threads and in many sizes: of FSDP2's processes with 0.8 GB of state each, heaps took 1.1 GB
    more than was in use (benchmarks/sharding.md).
    """
    _set_option(_MMAP_THRESHOLD, _LARGE_BYTES)


def return_free_pages() -> None:
    """Let glibc return what lies free between blocks that are in use; does nothing with another C library."""
    trim = _find_function("malloc_trim")
    if trim is not None:
        trim(0)


def _set_option(option: tuple[int, str], size_bytes: int) -> None:
    """Set an option that the user has not set."""
    number, variable = option
    set_option = _find_function("mallopt")
    if set_option is not None and variable not in os.environ:
        set_option(number, size_bytes)


def _find_function(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
