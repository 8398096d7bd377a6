"""Whether each process can be bound to the cores that are near its GPU.

accelerate does it where `ACCELERATE_CPU_AFFINITY` is set: it asks NVIDIA's library for the cores near the GPU whose number
is the process's local rank. It fails without that library, takes another GPU where only some are visible, and overrules the
cores that Slurm, a container or `taskset` has granted. So it is set only where none of this holds.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

_NODES = Path("/sys/devices/system/node")


def can_bind_to_nodes(num_gpus: int, environment: Mapping[str, str]) -> bool:
    """Whether binding helps and is right: several memory nodes, all cores granted, and GPUs that are numbered as they lie.

    Args:
        num_gpus: that this machine's processes use, one each.
    """
    numbered = [str(number) for number in range(num_gpus)]
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    return (
        num_gpus > 1
        and environment.get("CUDA_DEVICE_ORDER", "PCI_BUS_ID") == "PCI_BUS_ID"
        and (visible is None or [name.strip() for name in visible.split(",")][:num_gpus] == numbered)
        and len(list(_NODES.glob("node[0-9]*"))) > 1
        and has_all_cores()
        and find_spec("pynvml") is not None
    )


def has_all_cores() -> bool:
    """Whether this process may use every core of the machine."""
    return hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) == os.cpu_count()
