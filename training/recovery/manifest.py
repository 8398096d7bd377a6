"""A checkpoint's manifest: the size and the checksum of each file, by which a start recognizes a corrupt checkpoint."""

from __future__ import annotations

import hashlib
import json
import mmap
from pathlib import Path
from typing import Any

from onecurve.training.errors import BadInput
from onecurve.training.run_directory import MANIFEST_FILE, MOMENTS_FILE, PROGRESS_FILE, WEIGHTS_FILE

# Raise it when older versions cannot read what this one writes, or this one cannot read what older ones wrote.
_FORMAT = 1

_REQUIRED = (WEIGHTS_FILE, MOMENTS_FILE, PROGRESS_FILE)


def write_manifest(folder: Path) -> None:
    """Record size and sha256 of every file of a checkpoint."""
    files = {path.name: _describe_file(path) for path in sorted(folder.iterdir()) if path.name != MANIFEST_FILE}
    (folder / MANIFEST_FILE).write_text(json.dumps({"format": _FORMAT, "files": files}, indent=2), encoding="utf-8")


def find_fault(folder: Path, reads_content: bool = True) -> str | None:
    """What is wrong with a checkpoint, or None if every file is there and unchanged.

    Args:
        reads_content: compare checksums as well, not only sizes.

    Raises:
        BadInput: another version of Onecurve wrote it, so that this one cannot verify it.
    """
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        if manifest["format"] != _FORMAT:
            raise BadInput(
                f"{folder} was written by another version of Onecurve (format {manifest['format']}, this one reads "
                f"{_FORMAT}): resume with that version, or choose another output_dir"
            )
        for name in _REQUIRED:
            if name not in manifest["files"]:
                return f"{MANIFEST_FILE} does not list {name}"
        for name, expected in manifest["files"].items():
            path = folder / name
            if not path.exists():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
            if reads_content and _describe_file(path) != expected:
                return f"{name} is corrupt: its checksum differs"
    except FileNotFoundError:
        return f"{MANIFEST_FILE} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST_FILE} cannot be read: {error}"
    return None


def _describe_file(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    digest = hashlib.sha256()
    if size:
        # In one call: between calls, this thread would compete with the training thread for the interpreter's lock.
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            digest.update(content)
    return {"bytes": size, "sha256": digest.hexdigest()}
