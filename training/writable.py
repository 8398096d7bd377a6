"""Whether a folder that may not exist yet can be written to."""

from __future__ import annotations

import os
from pathlib import Path


def find_existing_parent(path: Path) -> Path:
    """The path itself or the nearest of its parents that exists."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def describe_unwritable(path: Path) -> str | None:
    """Why a folder can't be created or written to: what is in its place; None if it can."""
    nearest = find_existing_parent(path)
    if not nearest.is_dir():
        return f"{str(nearest)!r} is a file"
    return None if os.access(nearest, os.W_OK | os.X_OK) else f"{str(nearest)!r} is not writable"
