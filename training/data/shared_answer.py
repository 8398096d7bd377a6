"""What all processes of a machine would find alike, found by one of them: before there is a process group to ask in."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import time
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from onecurve.training.atomic_files import write_atomically
from onecurve.training.cache import find_cache
from onecurve.training.process import identify_launch

_SECONDS_KEPT = 86_400

# All processes of a launch ask the same questions in the same order.
_numbers = itertools.count()


def share_answer(subject: str, question: Callable[[], str]) -> str:
    """The answer of the first process of this launch and machine that asks; the others wait for it and read it.

    Another launch asks anew. Where the question raises an error, the next process asks it itself.

    Args:
        subject: what the question is about, the same on all processes.
    """
    number, launch = next(_numbers), identify_launch()
    if launch is None:
        return question()
    folder = find_cache() / "launches"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / hashlib.sha256(f"{launch}-{number}-{subject}".encode()).hexdigest()[:32]
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            write_atomically(path, question())
            _remove_old(folder)
        return path.read_text(encoding="utf-8")


def _remove_old(folder: Path) -> None:
    """Remove the answers of launches whose processes have all read them long ago."""
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _SECONDS_KEPT:
                path.unlink()
