"""Whether checkpoints fit into host memory and on the disk."""

from __future__ import annotations

import shutil
from pathlib import Path

from onecurve.training.errors import BadInput, Fault
from onecurve.training.recovery.host_memory import measure_available_memory
from onecurve.training.recovery.publishing import list_staging, list_unpublished
from onecurve.training.run_directory import RunDirectory
from onecurve.training.units import GIB
from onecurve.training.writable import find_existing_parent


def check_room(run: RunDirectory, state_bytes: int, weight_bytes: int, num_checkpoints: int, held_bytes: int) -> None:
    """Refuse, before the first step, a training whose checkpoints do not fit into host memory or on the disk.

    Args:
        state_bytes: size of one checkpoint: weights and moments.
        weight_bytes: size of final/.
        num_checkpoints: the most that exist at once.
        held_bytes: what the processes of this machine hold of a checkpoint before they write it.

    Raises:
        BadInput: there is too little memory or disk space.
    """
    memory = measure_available_memory()
    if held_bytes > memory:
        raise BadInput(
            f"a checkpoint takes {held_bytes / GIB:.3g} GiB of host memory on this machine, {memory / GIB:.3g} GiB are "
            "available: use a smaller model, or machines with more memory"
        )
    needed = num_checkpoints * state_bytes + weight_bytes - _count_existing_bytes(run)
    free = _count_free_bytes(run.path)
    if needed > free:
        raise BadInput(
            f"output_dir {str(run.path)!r}: {num_checkpoints} checkpoints of {state_bytes / GIB:.3g} GiB and the final "
            f"model need {needed / GIB:.3g} GiB more, {free / GIB:.3g} GiB are free there; lower save_total_limit, "
            "save less often (checkpointing_steps), or choose another output_dir"
        )


def check_free_space(target: Path, num_bytes: int) -> None:
    """Refuse to start a write for which the disk has no room.

    Raises:
        Fault: there is too little disk space.
    """
    free = _count_free_bytes(target)
    if free < num_bytes:
        raise Fault(f"it needs {num_bytes / GIB:.3g} GiB, {free / GIB:.3g} GiB are free on its disk; free some space")


def _count_existing_bytes(run: RunDirectory) -> int:
    """Bytes that are on the disk already: checkpoints count in the limit, and what a killed process left is removed."""
    folders = [*run.list_checkpoints(), *list_unpublished(run.checkpoints), *list_staging(run.final)]
    return sum(path.stat().st_size for folder in folders for path in folder.glob("*") if path.is_file())


def _count_free_bytes(path: Path) -> int:
    return shutil.disk_usage(find_existing_parent(path)).free
