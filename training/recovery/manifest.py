"""A checkpoint's manifest: the size and the checksum of each file, by which a start recognizes a corrupt checkpoint."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash

from onecurve.training.errors import BadInput
from onecurve.training.run_directory import MANIFEST_FILE, MOMENTS_FILE, PROGRESS_FILE, WEIGHTS_FILE, index_of

# Raise it when older versions cannot read what this one writes. In format 1 one process wrote all tensors, in one file of
# weights and one of moments; formats 1 and 2 have checksums by SHA-256.
_FORMAT = 3
_READABLE = (1, 2, 3)

# By their names in a manifest. XXH3 is for accidents, as SHA-256 beside the files was too, and is
# computed as fast as files are read.
_CHECKSUMS: dict[str, Callable[[], Any]] = {"xxh3_128": xxhash.xxh3_128, "sha256": hashlib.sha256}
_NEWEST = "xxh3_128"

FileFacts = dict[str, Any]
"""A file's "bytes", and its checksum under the name of its kind."""


def write_manifest(folder: Path, known: Mapping[str, FileFacts] | None = None) -> None:
    """Record size and checksum of every file of a checkpoint.

    Args:
        known: of files whose writers have computed them already.
    """
    known = known or {}
    files = {
        path.name: known.get(path.name) or describe_file(path)
        for path in sorted(folder.iterdir())
        if path.name != MANIFEST_FILE
    }
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
        if manifest["format"] not in _READABLE:
            raise BadInput(
                f"{folder} was written by another version of Onecurve (format {manifest['format']}, this one reads "
                f"up to {_FORMAT}): resume with that version, or choose another output_dir"
            )
        for names in ((WEIGHTS_FILE, index_of(WEIGHTS_FILE)), (MOMENTS_FILE, index_of(MOMENTS_FILE)), (PROGRESS_FILE,)):
            if not any(name in manifest["files"] for name in names):
                return f"{MANIFEST_FILE} does not list {names[0]}"
        for name, expected in manifest["files"].items():
            path = folder / name
            if not path.exists():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
        if reads_content and (corrupt := _find_corrupt(folder, manifest["files"])) is not None:
            return f"{corrupt} is corrupt: its checksum differs"
    except FileNotFoundError:
        return f"{MANIFEST_FILE} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST_FILE} cannot be read: {error}"
    return None


def _find_corrupt(folder: Path, files: Mapping[str, FileFacts]) -> str | None:
    """The first file whose content is not what the manifest says."""
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:  # All other processes wait meanwhile.
        found = pool.map(lambda name: describe_file(folder / name, _find_kind(files[name])), files)
        return next((name for name, facts in zip(files, found, strict=True) if facts != files[name]), None)


def _find_kind(facts: FileFacts) -> str:
    """Of a file's checksum; where it has none, one that it lacks."""
    return next((kind for kind in _CHECKSUMS if kind in facts), _NEWEST)


def describe_file(path: Path, kind: str = _NEWEST) -> FileFacts:
    """Size and checksum of a file.

    Args:
        kind: a key of `_CHECKSUMS`.
    """
    size = path.stat().st_size
    digest = _CHECKSUMS[kind]()
    if size:
        # In one call: between calls, this thread would compete with the training thread for the interpreter's lock.
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            digest.update(content)
    return {"bytes": size, kind: digest.hexdigest()}
