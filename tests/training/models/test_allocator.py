"""Freed blocks stay with the process, or go back to the system."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# glibc raises its threshold when the first large block is freed; the next one then lies in the heap.
_CODE = """
import ctypes, sys
from onecurve.training.models import allocator

size = int(sys.argv[2])
if sys.argv[1] in ("keep_blocks", "return_large_blocks"):
    getattr(allocator, sys.argv[1])()
library = ctypes.CDLL(None)
library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
library.free.argtypes = [ctypes.c_void_p]

def count_resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

library.free(library.malloc(size + (1 << 20)))
before = count_resident()
large = library.malloc(size)
ctypes.memset(large, 1, size)
behind = library.malloc(size // 3)  # What lies at the end of the heap is returned in any case.
library.free(large)
if sys.argv[1] == "return_free_pages":
    allocator.return_free_pages()
print(count_resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
@pytest.mark.parametrize(
    ("way", "mebibytes", "variables", "stays"),
    [
        ("default", 3, {}, True),
        ("default", 64, {}, False),
        ("keep_blocks", 64, {}, True),
        ("keep_blocks", 64, {"MALLOC_MMAP_THRESHOLD_": "33554432"}, False),
        ("return_large_blocks", 3, {}, False),
        ("return_large_blocks", 3, {"MALLOC_MMAP_THRESHOLD_": "33554432"}, True),
        ("return_free_pages", 3, {}, False),
    ],
)
def test_a_freed_block_stays_or_is_returned(way: str, mebibytes: int, variables: dict[str, str], stays: bool) -> None:
    own = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    words = [sys.executable, "-c", _CODE, way, str(mebibytes << 20)]
    result = subprocess.run(words, env={**own, **variables}, capture_output=True, text=True, check=True)
    assert (int(result.stdout) > (mebibytes << 20) * 2 // 3) == stays
