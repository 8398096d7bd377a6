"""The run directory at the start of a training: whether it can be written to, and its first files."""

from __future__ import annotations

import json
from typing import Any

from onecurve.training.atomic_files import write_atomically
from onecurve.training.config import ResolvedRecipe
from onecurve.training.errors import BadInput
from onecurve.training.recovery.run_lock import RunLock
from onecurve.training.run_directory import RunDirectory
from onecurve.training.writable import describe_unwritable


def check_writable(run: RunDirectory) -> None:
    """Refuse an `output_dir` that cannot hold a run, before anything is written.

    Raises:
        BadInput: it is a file, or it, or its nearest parent that exists, is not writable.
    """
    if problem := describe_unwritable(run.path):
        raise BadInput(f"output_dir {str(run.path)!r}: {problem}; choose another output_dir")


def create_run(run: RunDirectory, lock: RunLock, resolved: ResolvedRecipe, environment: dict[str, Any]) -> None:
    """Create and lock the folder, and write config.yaml and environment.json; that of the last start is kept beside it.

    Raises:
        BadInput: another training has started there since this one looked.
    """
    run.path.mkdir(parents=True, exist_ok=True)
    was_new = not lock.is_held
    lock.acquire()
    if was_new and lock.is_held and run.config.exists():
        raise BadInput(
            f"output_dir {str(run.path)!r}: another training started and ended there while this one was loading; start "
            "this one again to resume that run, or choose another output_dir"
        )
    before = run.read_environment()
    num_starts = before.get("num_starts", 0)
    num_starts = num_starts if isinstance(num_starts, int) else 0
    environment = environment | {"num_starts": num_starts + 1}
    if before:
        write_atomically(run.past_environment(num_starts), json.dumps(before, indent=2) + "\n")
    write_atomically(run.config, resolved.to_yaml())
    write_atomically(run.environment, json.dumps(environment, indent=2) + "\n")
