"""Signals to the launcher become a STOP file for the training: a checkpoint and an end, instead of a kill."""

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

# Shells, `timeout` and schedulers signal a process and its group: the same request arrives twice.
_SECONDS_OF_ONE_REQUEST = 0.5


@dataclass(frozen=True)
class StopWords:
    """What a stop means to those who ask for it, by the first signal and by the second."""

    first: str = "asked the training to write a checkpoint and stop"
    second: str = "ending all processes without a checkpoint"
    lost: str = "what was done after the last checkpoint is lost, `onecurve resume` goes on"


PREDICTION = StopWords("asked the labelling to stop", "ending all processes", "nothing is written, start it again")


class Stop:
    """Turns signals into a STOP file: the first asks for a checkpoint, the second ends the processes, the third kills."""

    def __init__(self, path: Path, words: StopWords) -> None:
        self.path = path
        self.words = words
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
                if number.name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN:  # nohup: the terminal may go.
                    before.append((number, signal.signal(number, self._handle)))
        try:
            yield
        finally:
            # Who was asked to stop ends soon, with the training's exit code: another signal must not end it before.
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
            _say(f"onecurve: {name}: {self.words.first}; again to end it at once")
        elif self.group is not None:
            forced = signal.SIGTERM if self._count == 2 else signal.SIGKILL
            _say(f"onecurve: {name} again: {self.words.second}")
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.group, forced)


def _say(message: str) -> None:
    os.write(2, f"{message}\n".encode())  # A signal may come in the middle of a buffered write.
