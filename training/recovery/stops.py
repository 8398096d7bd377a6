"""A requested stop: one rank notices it, all ranks agree on it, write a checkpoint and exit with code 75.

A stop is requested by a signal (SIGTERM, SIGINT, SIGUSR1, SIGHUP) to any rank, a file STOP in the run directory, the file
`$ONECURVE_STOP_FILE`, or the death of the launcher. The rank that notices it raises its flag. The flag is part of reductions
that happen anyway, so that all ranks stop after the same step. A second SIGINT ends the process immediately.

Python calls a signal handler only when the main thread returns from native code. In a collective that waits for a dead
rank, it never returns; so a thread receives the signals as well.
"""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from onecurve.training import launch_protocol
from onecurve.training.launch_protocol import STOP_SIGNALS
from onecurve.training.outcome import Outcome, end_immediately
from onecurve.training.process import is_main_process, launcher_has_died
from onecurve.training.recovery.watchdog import Watchdog
from onecurve.training.run_directory import RunDirectory


class StopRequested(Exception):
    """All ranks agreed to stop."""


class StopFlag:
    """Whether this rank has noticed a request to stop.

    Args:
        run: the run directory whose STOP file counts, if any.
        watchdog: gets a heartbeat each time the flag is read.
        outcome: where the end of a process without a checkpoint is reported.
    """

    def __init__(self, run: RunDirectory | None, watchdog: Watchdog, outcome: Outcome) -> None:
        self.reason: str | None = None
        self._watchdog = watchdog
        self._outcome = outcome
        self._write_end: int | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._files = [run.stop] if run is not None else []
        if launch_protocol.STOP_FILE in os.environ:
            self._files.append(Path(os.environ[launch_protocol.STOP_FILE]))

    def listen(self) -> None:
        """Take signals as requests to stop from now on. Call it in the main thread, before training."""
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # Under nohup, SIGHUP stays ignored.
                self._before[number] = signal.signal(number, self._handle)
        read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        threading.Thread(target=self._receive, args=(read_end,), name="signals", daemon=True).start()

    def close(self) -> None:
        """Leave signals as they were and end the thread, so that a process can train again."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
        if self._write_end is not None:
            signal.set_wakeup_fd(-1)
            os.close(self._write_end)
            self._write_end = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.reason = signal.Signals(number).name

    def _receive(self, read_end: int) -> None:
        """Do what cannot wait for the main thread; Python writes the number of each signal into the pipe."""
        num_interrupts = 0
        while numbers := os.read(read_end, 1):
            if numbers[0] == signal.SIGTERM:
                self._watchdog.shorten_limit()
            num_interrupts += numbers[0] == signal.SIGINT
            if num_interrupts > 1:
                end_immediately(self._outcome)
        os.close(read_end)

    def is_raised(self) -> bool:
        """Look for a request, and send a heartbeat to the watchdog: after each step and each batch of an evaluation.

        It takes a few microseconds.
        """
        self._watchdog.beat()
        if self.reason is None and launcher_has_died():
            self.reason = "the launcher has died"
        if self.reason is None and is_main_process():
            self.reason = next((str(path) for path in self._files if path.exists()), None)
        return self.reason is not None

    def clear(self) -> None:
        """Remove the run directory's STOP once the training has stopped; otherwise the next start would stop as well."""
        if is_main_process():
            self._files[0].unlink(missing_ok=True)
