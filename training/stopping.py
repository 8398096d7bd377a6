"""A stop that is asked for: noticed by one process, agreed on by all, followed by a checkpoint and exit code 75.

A signal (SIGTERM, SIGINT, SIGUSR1) to any rank, a file STOP in the run directory, the file `$ONECURVE_STOP_FILE`, or the
death of the launcher raise a flag in one process. The flag travels with reductions that are there anyway, so that every
process stops after the same step. A second SIGINT ends the process at once.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import FrameType

from training.faults import is_main_process, launcher_is_gone
from training.run_directory import RunDirectory
from training.watchdog import Watchdog

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))


class StopRequested(Exception):
    """All processes agreed, in the middle of an evaluation, to stop."""


class StopFlag:
    """Whether this process was asked to stop. Make one before training, in the main thread.

    Args:
        watchdog: who looks at the flag is alive.
    """

    def __init__(self, run: RunDirectory, watchdog: Watchdog) -> None:
        self.reason: str | None = None
        self._watchdog = watchdog
        self._files = [run.path / "STOP"]
        if "ONECURVE_STOP_FILE" in os.environ:
            self._files.append(Path(os.environ["ONECURVE_STOP_FILE"]))
        for number in _SIGNALS:
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.reason is not None:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt
        if number == signal.SIGTERM:
            self._watchdog.hurry()
        self.reason = signal.Signals(number).name

    def is_raised(self) -> bool:
        """Look once, after each step and each batch of an evaluation: costs a few microseconds."""
        self._watchdog.beat()
        if self.reason is None and launcher_is_gone():
            self.reason = "the launcher is gone"
        if self.reason is None and is_main_process():
            self.reason = next((str(path) for path in self._files if path.exists()), None)
        return self.reason is not None

    def clear(self) -> None:
        """Take the run directory's STOP away once it is obeyed, or the next start would stop as well."""
        if is_main_process():
            self._files[0].unlink(missing_ok=True)
