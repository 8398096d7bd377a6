"""Writes a process's part of a checkpoint while it is gathered, where the training itself lies in host memory.

A whole copy of the state would take as much memory again as weights and moments. So the part is cut into pieces, of which one
is written while the next one is filled.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from onecurve.training.parallel.states import Tensors
from onecurve.training.recovery.parts import save_tensors


class PieceWriter:
    """Writes one piece at a time in a thread."""

    def __init__(self, staging: Path) -> None:
        self._staging = staging
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._error: BaseException | None = None
        self._files: list[str] = []

    def write(self, file: str, tensors: Tensors) -> None:
        """Wait for the piece before, and start to write this one; its tensors may not be changed any more.

        After one has failed the others are dropped: the rest of the state still has to be gathered, for other processes.
        """
        self._wait()
        if self._error is None:
            self._files.append(file)
            self._pending = self._pool.submit(save_tensors, tensors, self._staging / file, False)

    def finish(self) -> list[str]:
        """Wait until all are written, though not yet on the disk; returns the names of their files.

        Raises:
            Exception: what the first failure raised.
        """
        self._wait()
        self._pool.shutdown()
        if self._error is not None:
            raise self._error
        return self._files

    def _wait(self) -> None:
        if self._pending is not None:
            self._error = self._error or self._pending.exception()
            self._pending = None  # And with it the tensors.
