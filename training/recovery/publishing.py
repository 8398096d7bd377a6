"""Publish a folder: it appears under its name complete and synced to disk, or not at all.

A folder is filled under a staging name, synced, and renamed. If a folder with the name exists, it gets a "replaced" name
first. After a kill in between, `clean_up` finishes or undoes the rename.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from onecurve.training.run_directory import CHECKPOINT_PATTERN, RunDirectory

_STAGING, _REPLACED = ".tmp", ".replaced"


def publish(target: Path, fill: Callable[[Path], None]) -> str | None:
    """Let `fill` write a staging folder, and rename it to `target`.

    Returns:
        The error message if that failed; then `target` is as it was before, and the staging folder is removed.
    """
    staging, replaced = staging_path(target), _replaced_path(target)
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        fill(staging)
        _sync_folder(staging)
        if target.exists():
            shutil.rmtree(replaced, ignore_errors=True)  # A killed process may have left both.
            target.rename(replaced)
        staging.rename(target)
        sync(target.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except Exception as error:  # safetensors has its own exception for a full disk.
        shutil.rmtree(staging, ignore_errors=True)
        return (
            f"{str(target)!r} could not be written: {error}. Earlier checkpoints are intact: start it again to resume"
        )
    return None


def remove(folder: Path) -> None:
    """Remove a published folder; if a kill interrupts that, no part of it is left under its name."""
    shutil.rmtree(folder.rename(staging_path(folder)))


def link_best(run: RunDirectory, checkpoint: Path) -> None:
    """Let the link `best` point to a checkpoint, in one step."""
    link = staging_path(run.best)
    link.unlink(missing_ok=True)
    link.symlink_to(checkpoint.relative_to(run.path))
    link.replace(run.best)


def clean_up(folder: Path) -> None:
    """Finish or undo what a killed process left half-done among the checkpoints in `folder`.

    Only for the process that holds the lock of the run directory.
    """
    for staging in folder.glob(f".{CHECKPOINT_PATTERN}{_STAGING}"):
        shutil.rmtree(staging)
    for replaced in list_replaced(folder):
        target = folder / replaced.name[1:].removesuffix(_REPLACED)
        if target.exists():
            shutil.rmtree(replaced)
        else:
            replaced.rename(target)


def staging_path(target: Path) -> Path:
    """Where `target` is written before it gets its name."""
    return target.with_name(f".{target.name}{_STAGING}")


def _replaced_path(target: Path) -> Path:
    return target.with_name(f".{target.name}{_REPLACED}")


def list_replaced(folder: Path) -> list[Path]:
    """Checkpoints that were about to be replaced when a process was killed."""
    return sorted(folder.glob(f".{CHECKPOINT_PATTERN}{_REPLACED}"))


def list_unpublished(folder: Path) -> list[Path]:
    """What a killed process left of the checkpoints in `folder`: staging and replaced folders."""
    return sorted(folder.glob(f".{CHECKPOINT_PATTERN}"))


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's entries, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    for path in folder.iterdir():
        sync(path)
    sync(folder)
