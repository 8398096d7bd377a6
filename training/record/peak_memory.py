"""The most memory that this process has used."""

from __future__ import annotations

import platform
import resource

import torch


def measure_peak_memory() -> int:
    """Bytes of the GPU if there is one, else of the host."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024
