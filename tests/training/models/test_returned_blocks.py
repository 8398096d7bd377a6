"""Large blocks go back to the system as soon as they are freed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# glibc raises its threshold when the first large block is freed; the next one would then stay below the small one.
_CODE = """
import ctypes, sys
from onecurve.training.models.returned_blocks import return_free_pages, return_large_blocks

if sys.argv[1] == "returned":
    return_large_blocks()
library = ctypes.CDLL(None)
library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
library.free.argtypes = [ctypes.c_void_p]

def count_resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

library.free(library.malloc(4 << 20))
before = count_resident()
large = library.malloc(3 << 20)
ctypes.memset(large, 1, 3 << 20)
small = library.malloc(100_000)
library.free(large)
if sys.argv[1] == "trimmed":
    return_free_pages()
print(count_resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
@pytest.mark.parametrize(
    ("way", "variables", "stays"),
    [
        ("returned", {}, False),
        ("kept", {}, True),
        ("trimmed", {}, False),
        ("returned", {"MALLOC_MMAP_THRESHOLD_": "33554432"}, True),
    ],
)
def test_a_large_block_is_returned(way: str, variables: dict[str, str], stays: bool) -> None:
    own = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    words = [sys.executable, "-c", _CODE, way]
    result = subprocess.run(words, env={**own, **variables}, capture_output=True, text=True, check=True)
    assert (int(result.stdout) > 2 << 20) == stays
