"""`onecurve watch`, live: the run directory is read and drawn again and again, and the queue asked now and then."""

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

# A queue serves many; it is not to be asked at each look.
_SECONDS_BETWEEN_QUESTIONS = 30.0


def find_run_directory(target: str) -> Path:
    """The run directory that a person names, by its path or by the number of the Slurm job that trains in it.

    Raises:
        NotARun: it is neither.
    """
    folder = Path(target) if Path(target).exists() else find_run(target)
    if folder is None:
        raise NotARun(f"{target!r} is neither a run directory nor the number of a job that `onecurve submit` has sent")
    return folder


def wait_for_start(console: Console, run: Path, every_seconds: float) -> bool:
    """While its job waits in the queue, a run directory is empty: say so, and wait for the training to begin.

    Args:
        every_seconds: between looks; 0 looks once.

    Returns:
        whether it has begun, or there is no job to wait for.
    """
    told, due = None, -math.inf
    while not RunDirectory(run).config.is_file():
        if time.monotonic() >= due:
            due = time.monotonic() + _SECONDS_BETWEEN_QUESTIONS
            job = find_job(run)
            if job is None:
                return True
            if job.state != told:
                console.print(job.describe(), highlight=False, markup=False)
                told = job.state
            if job.is_over or not every_seconds:
                return False
        time.sleep(every_seconds)
    return True


class QueuePoller:
    """A queue that is asked now and then, in a thread, so that neither a drawing nor Ctrl-C waits for its answer."""

    def __init__(self, queue: Queue, seconds_between: float = _SECONDS_BETWEEN_QUESTIONS) -> None:
        self._queue = queue
        self._seconds_between = seconds_between
        self._due = -math.inf
        self._thread: threading.Thread | None = None
        self._answer: QueueState | None = None

    @property
    def is_asking(self) -> bool:
        """Whether an answer is on its way."""
        return self._thread is not None and self._thread.is_alive()

    def __call__(self, run: Path) -> QueueState | None:
        """The last answer; that to a new question if it comes at once."""
        if not self.is_asking and time.monotonic() >= self._due:
            self._due = time.monotonic() + self._seconds_between
            self._thread = threading.Thread(target=self._ask, args=(run,), daemon=True)
            self._thread.start()
            self._thread.join(timeout=0.3)
        return self._answer

    def _ask(self, run: Path) -> None:
        self._answer = self._queue(run)


def follow(console: Console, run: Path, every_seconds: float, queue: Queue = find_job) -> None:
    """Draw again and again until the run has ended for good or the user has seen enough."""
    from rich.live import Live

    poller, metrics = QueuePoller(queue), MetricsFile(RunDirectory(run).metrics)
    view = build_view(run, poller, metrics=metrics)
    first = render(view, _width(console))
    with _noticing_ctrl_c() as asked, Live(first, console=console, refresh_per_second=4) as live:
        while not view.is_over or (view.state != "finished" and poller.is_asking):
            until = time.monotonic() + every_seconds
            while not asked and time.monotonic() < until:
                time.sleep(min(0.1, every_seconds))
            if asked:
                return
            view = build_view(run, poller, metrics=metrics)
            live.update(render(view, _width(console)))


@contextlib.contextmanager
def _noticing_ctrl_c() -> Iterator[list[int]]:
    """Collect Ctrl-C instead of raising it anywhere: raised in the middle of a drawing, it was once seen to get lost."""
    asked: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: asked.append(number))
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def _width(console: Console) -> int:
    return max(20, console.width - 16)
