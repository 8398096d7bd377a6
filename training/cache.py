"""Folders of this user that a training writes to beside its run directory, and what to set where one can't be written to."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from onecurve.training.errors import BadInput
from onecurve.training.writable import describe_unwritable


def find_cache() -> Path:
    """Where prepared data and compiled operators are kept on this machine: $ONECURVE_CACHE, or ~/.cache/onecurve."""
    return Path(os.environ.get("ONECURVE_CACHE") or _find_home() / ".cache" / "onecurve")


def find_operators() -> Path:
    """Where DeepSpeed's compiled operators are kept: a folder for each Python environment.

    Two that shared one would compile each other's anew, for a minute, whenever they take turns.
    """
    environment = hashlib.sha256(sys.prefix.encode()).hexdigest()[:16]
    return find_cache() / "torch_extensions" / environment


def find_hub_cache() -> Path:
    """Where the hub's client keeps downloads: $HF_HOME, or ~/.cache/huggingface."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or _find_home() / ".cache")
    return Path(os.environ.get("HF_HOME") or caches / "huggingface").expanduser()


def find_unwritable_folders(names: Iterable[str | None]) -> list[str]:
    """Which of these folders can't be written to, one line each with what to set.

    Args:
        names: of models and data sets; one that is no local path may have to be downloaded.
    """
    problems = []
    if problem := describe_unwritable(find_cache()):
        problems.append(
            f"the cache of prepared data, {str(find_cache())!r}, can't be written to: {problem}; set ONECURVE_CACHE to a "
            "folder that can"
        )
    downloads = any(name is not None and not Path(name).exists() for name in names)
    is_offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON")
    if downloads and not is_offline and (problem := describe_unwritable(find_hub_cache())):
        problems.append(
            f"the hub's cache, {str(find_hub_cache())!r}, can't be written to: {problem}; set HF_HOME to a folder that can"
        )
    try:
        tempfile.gettempdir()
    except OSError as error:
        problems.append(
            f"no folder for temporary files can be written to: {error.strerror}; set TMPDIR to one that can"
        )
    return problems


def check_folders(names: Iterable[str | None]) -> None:
    """Refuse to start where a folder that is needed can't be written to.

    Args:
        names: as for `find_unwritable_folders`.

    Raises:
        BadInput: naming each folder, and the variable to set.
    """
    if problems := find_unwritable_folders(names):
        raise BadInput("\n  ".join(problems))


def _find_home() -> Path:
    # Without HOME and without an entry for this user, `~` stays as it is, and would become a folder of that name here.
    home = os.path.expanduser("~")
    return Path("/nonexistent" if home == "~" else home)
