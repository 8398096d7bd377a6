"""Turns signals to the launcher into a STOP file for the training, which then writes a checkpoint and ends."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from onecurve.training.launch_protocol import STOP_SIGNALS

# Shells, `timeout` and schedulers signal a process and its group, so one request arrives twice.
_SECONDS_OF_ONE_REQUEST = 0.5


@dataclass(frozen=True)
class StopMessages:
    """What is printed after the first signal, after the second, and at the end of a run that the second one ended."""

    first: str = "asked the training to write a checkpoint and stop"
    second: str = "ending all processes without a checkpoint"
    lost: str = "steps after the last checkpoint are lost; continue with `onecurve resume`"


PREDICTION = StopMessages(
    "asked the prediction to stop", "ending all processes", "no output was written; start it again"
)


class Stop:
    """Turns signals into a STOP file: the first asks for a checkpoint, the second ends the processes, the third kills."""

    def __init__(self, path: Path, messages: StopMessages) -> None:
        self.path = path
        self.messages = messages
        self.group: int | None = None
        self._count = 0
        self._last = -math.inf

    @property
    def was_asked(self) -> bool:
        """Whether a signal or, by the file, a batch script has asked for a stop."""
        return self._count > 0 or self.path.exists()

    @property
    def was_forced(self) -> bool:
        """Whether the processes were ended by a second signal."""
        return self._count > 1

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals in STOP_SIGNALS while this context is open."""
        before: list[tuple[signal.Signals, Any]] = []
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                # Under nohup SIGHUP is ignored, and the training outlives its terminal.
                if number.name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN:
                    before.append((number, signal.signal(number, self._handle)))
        try:
            yield
        finally:
            # After a stop the launcher ends soon, with the training's exit code; another signal must not end it earlier.
            if not self.was_asked:
                for number, handler in before:
                    signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - self._last < _SECONDS_OF_ONE_REQUEST:
            return
        self._last = now
        self._count += 1
        name = signal.Signals(number).name
        if self._count == 1:
            self.path.touch()
            _print_now(f"onecurve: {name}: {self.messages.first}; again to end it at once")
        elif self.group is not None:
            forced = signal.SIGTERM if self._count == 2 else signal.SIGKILL
            _print_now(f"onecurve: {name} again: {self.messages.second}")
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.group, forced)


def _print_now(message: str) -> None:
    os.write(2, f"{message}\n".encode())  # Not buffered: a signal may arrive in the middle of a buffered write.
