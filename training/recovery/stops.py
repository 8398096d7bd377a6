"""A stop that is asked for: noticed by one process, agreed on by all, followed by a checkpoint and exit code 75.

A signal (SIGTERM, SIGINT, SIGUSR1, SIGHUP) to any rank, a file STOP in the run directory, the file `$ONECURVE_STOP_FILE`, or the
death of the launcher raise a flag in one process. The flag travels with reductions that are there anyway, so that every
process stops after the same step. A second SIGINT ends the process at once.

Python runs a signal's handler once the main thread is back from native code. From a collective in which one waits for a
dead process it never comes back, so a thread hears of signals as well.
"""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from types import FrameType

from onecurve.training.errors import STOP_SIGNALS, Outcome, end_at_once, is_main_process, launcher_is_gone
from onecurve.training.recovery.watchdog import Watchdog
from onecurve.training.run_directory import RunDirectory


class StopRequested(Exception):
    """All processes agreed, in the middle of an evaluation, to stop."""


class StopFlag:
    """Whether this process was asked to stop.

    Args:
        run: where a file STOP asks for it, if anywhere.
        watchdog: who looks at the flag is alive.
        outcome: where an end without a checkpoint is told.
    """

    def __init__(self, run: RunDirectory | None, watchdog: Watchdog, outcome: Outcome) -> None:
        self.reason: str | None = None
        self._watchdog = watchdog
        self._outcome = outcome
        self._pipe: int | None = None
        self._files = [run.stop] if run is not None else []
        if "ONECURVE_STOP_FILE" in os.environ:
            self._files.append(Path(os.environ["ONECURVE_STOP_FILE"]))

    def listen(self) -> None:
        """From now on a signal is a stop that is asked for. For the main thread, before training."""
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup: the terminal may go.
                signal.signal(number, self._receive)
        ears, self._pipe = os.pipe()
        os.set_blocking(self._pipe, False)
        signal.set_wakeup_fd(self._pipe, warn_on_full_buffer=False)
        threading.Thread(target=self._hear, args=(ears,), name="signals", daemon=True).start()

    def close(self) -> None:
        """Let the thread end, so that a process can train again."""
        if self._pipe is not None:
            signal.set_wakeup_fd(-1)
            os.close(self._pipe)
            self._pipe = None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.reason = signal.Signals(number).name

    def _hear(self, ears: int) -> None:
        """Do at once what can't wait for the main thread; the system writes the number of each signal into the pipe."""
        num_interrupts = 0
        while numbers := os.read(ears, 1):
            if numbers[0] == signal.SIGTERM:
                self._watchdog.hurry()
            num_interrupts += numbers[0] == signal.SIGINT
            if num_interrupts > 1:
                end_at_once(self._outcome)
        os.close(ears)

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
