"""How much host memory this process may still take. A container or a job often allows less than the machine has."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import psutil


def measure_available_memory() -> int:
    """Bytes that are left on the machine and in every control group of this process, whichever is less."""
    available = int(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError, KeyError):  # Not Linux, or control groups of version 1.
        own, root = _find_own_group()
        groups = [own, *(group for group in own.parents if group.is_relative_to(root))]
        available = min(available, *map(_measure_group, groups))
    return available


def _find_own_group() -> tuple[Path, Path]:
    root = Path("/sys/fs/cgroup")
    return root / Path("/proc/self/cgroup").read_text(encoding="utf-8").partition("0::/")[2].strip(), root


def _measure_group(group: Path) -> int:
    """Bytes that are left in a control group. Its cache of files counts as free, because the system can drop it."""
    if not (group / "memory.max").exists() or (limit := (group / "memory.max").read_text().strip()) == "max":
        return sys.maxsize
    used = int((group / "memory.current").read_text())
    statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    cached = int(statistics["active_file"]) + int(statistics["inactive_file"])
    return max(0, int(limit) - used + cached)
