"""What a process knows before any process group exists: its rank, the launcher that started it, the signals that stop it."""

from __future__ import annotations

import os
import socket

from onecurve.training import launch_protocol
from onecurve.training.errors import LostLauncher

# torch reads it when a GPU is first used. `onecurve run` sets and prints it; `accelerate launch` does not.
os.environ.update(launch_protocol.choose_allocator(os.environ))

# Variables of accelerate, torch's agent, MPI and `onecurve`: what has one of them was started by a launcher.
_OF_LAUNCHERS = (
    "ACCELERATE_", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "OMPI_", "PMI_", "MV2_", launch_protocol.STOP_FILE,
    launch_protocol.STATUS_FILE,
)  # fmt: skip


def _find_launcher() -> int | None:
    """The parent, if it is a launcher. Any other, such as a shell, may end before this process does, as under nohup."""
    return os.getppid() if any(name.startswith(_OF_LAUNCHERS) for name in os.environ) else None


# Read as early as possible: each script imports this module first. If the launcher dies later, the parent changes.
_LAUNCHER_ID = _find_launcher()


def is_main_process() -> bool:
    """Whether this is rank 0, which prints and writes for all ranks."""
    rank = os.environ.get("RANK", "0")
    return not rank.isdecimal() or int(rank) == 0  # Whatever else stands there is refused, by a process that reports.


def launcher_has_died() -> bool:
    """Whether the launcher that started this process has died, so that nothing supervises it any more."""
    return _LAUNCHER_ID is not None and os.getppid() != _LAUNCHER_ID


def count_local_processes() -> int:
    """Processes of this launch on this machine."""
    count = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, int(count)) if count.isdecimal() else 1  # Whatever else stands there is refused later.


def count_local_cores() -> int:
    """This process's share of the cores that the launch may use on this machine."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return usable // count_local_processes()


def identify_launch() -> str | None:
    """A name that the processes of this launch on this machine share, and no others; None where there is only one.

    Torch's agent has started them all, so it is the agent's number and the time at which it began.
    """
    if count_local_processes() < 2 or _LAUNCHER_ID is None or launcher_has_died():
        return None
    import psutil

    try:
        began = psutil.Process(_LAUNCHER_ID).create_time()
    except psutil.Error:
        return None
    return f"{socket.gethostname()}-{_LAUNCHER_ID}-{began}"


def check_launcher() -> None:
    """Stop if the launcher has died. Call it in long work before the first step, where ranks do not agree on stops yet.

    Raises:
        LostLauncher: the launcher has died.
    """
    if launcher_has_died():
        raise LostLauncher
