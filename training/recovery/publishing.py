"""Publish a folder: it appears under its name complete and synced to disk, or not at all.

A folder is filled under a staging name, by one process or several, synced, and renamed. If a folder with the name exists, it
gets a "replaced" name first. After a kill in between, `clean_up` finishes or undoes the rename.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from onecurve.training.run_directory import CHECKPOINT_PATTERN, MANIFEST_FILE, RunDirectory

_STAGING, _REPLACED = ".tmp", ".replaced"


def publish(target: Path, fill: Callable[[Path], None]) -> str | None:
    """Let `fill` write a staging folder, and rename it to `target`.

    Returns:
        The error message if that failed; then `target` is as it was before, and the staging folder is removed.
    """
    staging = None
    try:
        staging = begin(target)
        fill(staging)
        finish(staging, target)
    except Exception as error:  # safetensors has its own exception for a full disk.
        discard(staging)
        return describe_failure(target, error)
    return None


def begin(target: Path) -> Path:
    """Make an empty staging folder. No two have the same name: a process of a killed start may still write into an old one."""
    for left in list_staging(target):
        shutil.rmtree(left, ignore_errors=True)
    staging = target.with_name(f".{target.name}.{secrets.token_hex(4)}{_STAGING}")
    staging.mkdir(parents=True)
    return staging


def finish(staging: Path, target: Path) -> None:
    """Sync the staging folder and give it its name."""
    replaced = _replaced_path(target)
    _follow_umask(staging)
    _sync_folder(staging)
    if target.exists():
        shutil.rmtree(replaced, ignore_errors=True)  # A killed process may have left both.
        target.rename(replaced)
    staging.rename(target)
    sync(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def discard(staging: Path | None) -> None:
    """Remove a staging folder that will not be published."""
    if staging is not None:
        shutil.rmtree(staging, ignore_errors=True)


def describe_failure(target: Path, error: Exception) -> str:
    """One line for a folder that could not be published."""
    return f"{str(target)!r} could not be written: {error}. Earlier checkpoints are intact: start it again to resume"


def _follow_umask(folder: Path) -> None:
    """Give each file the permissions that the folder got when it was made: safetensors lets only the owner read."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def remove(folder: Path) -> None:
    """Remove a published folder; if a kill interrupts that, no part of it is left under its name."""
    shutil.rmtree(folder.rename(_staging_path(folder)))


def link_best(run: RunDirectory, checkpoint: Path) -> str | None:
    """Let the link `best` point to a checkpoint, in one step.

    Returns:
        A line for the user where `best` was a folder: a run that was copied with its links followed has a copy there.
    """
    line = None
    if run.best.is_dir() and not run.best.is_symlink():
        line = _replace_copy(run)
    link = _staging_path(run.best)
    link.unlink(missing_ok=True)
    link.symlink_to(checkpoint.relative_to(run.path))
    link.replace(run.best)
    return line


def _replace_copy(run: RunDirectory) -> str:
    """Make room for the link: remove a checkpoint's copy, and set anything else aside."""
    is_copy = (run.best / MANIFEST_FILE).is_file()
    aside = run.best.rename(_find_free_name(run.best))
    if is_copy:
        shutil.rmtree(aside)
        return f"{run.best} was a copy of a checkpoint, as in a run that was copied: it is a link again."
    return f"{run.best} was a folder that is no checkpoint: it is {aside.name} now, and best a link."


def _find_free_name(path: Path) -> Path:
    number = 1
    while (free := path.with_name(f"{path.name}_{number}")).exists():
        number += 1
    return free


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


def list_staging(target: Path) -> list[Path]:
    """Folders in which `target` is, or was, written before it gets its name."""
    return [*target.parent.glob(f".{target.name}.*{_STAGING}"), *target.parent.glob(f".{target.name}{_STAGING}")]


def _staging_path(target: Path) -> Path:
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
