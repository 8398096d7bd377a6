"""`onecurve watch`, live: reads and draws the run directory repeatedly, and polls Slurm's queue."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from onecurve.launcher.cluster.queue import QueueState, find_job, find_run
from onecurve.launcher.errors import NotARun
from onecurve.launcher.facts.history import MetricsFile
from onecurve.launcher.views.progress import Queue, build_view
from onecurve.launcher.views.watch import render
from onecurve.training.run_directory import RunDirectory

if TYPE_CHECKING:
    from rich.console import Console

# Slurm's queue is shared by all users, so it is polled less often than the run directory is read.
_SECONDS_BETWEEN_POLLS = 30.0


def find_run_directory(target: str) -> Path:
    """The run directory with this path, or of the Slurm job with this number.

    Raises:
        NotARun: it is neither.
    """
    folder = Path(target) if Path(target).exists() else find_run(target)
    if folder is None:
        raise NotARun(f"{target!r} is neither a run directory nor the number of a job of `onecurve submit`")
    return folder


def wait_for_start(console: Console, run: Path, every_seconds: float) -> bool:
    """Wait for the training to start, and print the state of its job while it waits in the queue.

    Args:
        every_seconds: between two looks; with 0 it looks once and does not wait.

    Returns:
        Whether the training has started, or there is no job to wait for.
    """
    printed, due = None, -math.inf
    while not RunDirectory(run).config.is_file():
        if time.monotonic() >= due:
            due = time.monotonic() + _SECONDS_BETWEEN_POLLS
            job = find_job(run)
            if job is None:
                return True
            if job.state != printed:
                console.print(job.describe(), highlight=False, markup=False)
                printed = job.state
            if job.is_over or not every_seconds:
                return False
        time.sleep(every_seconds)
    return True


class QueuePoller:
    """Polls a queue in a thread, so that neither drawing nor Ctrl-C waits for its answer."""

    def __init__(self, queue: Queue, seconds_between: float = _SECONDS_BETWEEN_POLLS) -> None:
        self._queue = queue
        self._seconds_between = seconds_between
        self._due = -math.inf
        self._thread: threading.Thread | None = None
        self._answer: QueueState | None = None

    @property
    def is_polling(self) -> bool:
        """Whether a poll is in progress."""
        return self._thread is not None and self._thread.is_alive()

    def __call__(self, run: Path) -> QueueState | None:
        """The last answer; starts a new poll when one is due, and waits for it briefly."""
        if not self.is_polling and time.monotonic() >= self._due:
            self._due = time.monotonic() + self._seconds_between
            self._thread = threading.Thread(target=self._poll, args=(run,), daemon=True)
            self._thread.start()
            self._thread.join(timeout=0.3)
        return self._answer

    def _poll(self, run: Path) -> None:
        self._answer = self._queue(run)


def follow(console: Console, run: Path, every_seconds: float, queue: Queue = find_job) -> None:
    """Draw repeatedly until the run has ended for good, or Ctrl-C."""
    from rich.live import Live

    poller, metrics = QueuePoller(queue), MetricsFile(RunDirectory(run).metrics)
    view = build_view(run, poller, metrics=metrics)
    first = render(view, console.width)
    with _collecting_ctrl_c() as interrupts, Live(first, console=console, refresh_per_second=4) as live:
        while not view.is_over or (view.state != "finished" and poller.is_polling):
            until = time.monotonic() + every_seconds
            while not interrupts and time.monotonic() < until:
                time.sleep(min(0.1, every_seconds))
            if interrupts:
                return
            view = build_view(run, poller, metrics=metrics)
            live.update(render(view, console.width))


@contextlib.contextmanager
def _collecting_ctrl_c() -> Iterator[list[int]]:
    """Collect Ctrl-C in a list instead of raising KeyboardInterrupt, which can get lost while rich is drawing."""
    interrupts: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: interrupts.append(number))
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, before)
