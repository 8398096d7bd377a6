"""How far work beside the steps is, and the time left: tokenizing, predicting, saving. Short work shows nothing."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from onecurve.training.units import GIB, format_seconds

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

Item = TypeVar("Item")

# Shorter work needs no bar.
_SECONDS_WITHOUT = 3.0
_SECONDS_BETWEEN_LINES = 30.0
_SECONDS_BETWEEN_LOOKS = 0.5


class WorkProgress:
    """A bar in a terminal, and elsewhere a line every half minute.

    Args:
        what: is done, such as "tokenizing train".
        total: of the units.
        say: prints a line; None makes a bar in a terminal. Where another bar is on the screen there must be one.
        clock: seconds.
    """

    def __init__(
        self,
        what: str,
        total: float,
        unit: str,
        say: Callable[[str], None] | None = None,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        from rich.console import Console

        self._what, self._total, self._unit, self._clock = what, total, unit, clock
        self._console = console or Console()
        self._say = say or (None if self._console.is_terminal else self._print)
        self._done = 0.0
        self._started = clock()
        self._due = self._started + (_SECONDS_WITHOUT if self._say is None else _SECONDS_BETWEEN_LINES)
        self._bar: Progress | None = None

    def __enter__(self) -> WorkProgress:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, count: float) -> None:
        """So many units more are done."""
        self.reach(self._done + count)

    def reach(self, done: float) -> None:
        """So many units are done by now."""
        self._done = min(done, self._total)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self._done, left=self._describe_left())
        elif self._clock() >= self._due and 0 < self._done < self._total:
            self._show()

    def _show(self) -> None:
        if self._say is not None:
            self._due = self._clock() + _SECONDS_BETWEEN_LINES
            done, total = (f"{value:,.{1 if self._unit == 'GiB' else 0}f}" for value in (self._done, self._total))
            self._say(f"{self._what}: {done} of {total} {self._unit}, {self._describe_left()}")
            return
        from rich.progress import BarColumn, Progress, TextColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:.0f} %  {task.fields[left]}"),
        )
        self._bar = Progress(*columns, console=self._console, transient=True)
        task = self._bar.add_task(self._what, total=self._total, left=self._describe_left())
        self._bar.update(task, completed=self._done)
        self._bar.start()

    def _describe_left(self) -> str:
        """At the mean rate so far: it is steadier than the last one."""
        spent = self._clock() - self._started
        return f"{format_seconds(round(spent * (self._total - self._done) / max(self._done, 1e-9)))} left"

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


def follow(what: str, items: Collection[Item], unit: str) -> Iterator[Item]:
    """The items, and how many of them were taken."""
    with WorkProgress(what, len(items), unit) as progress:
        for item in items:
            yield item
            progress.advance(1)


@contextlib.contextmanager
def following_files(what: str, folder: Path | None, num_bytes: int, say: Callable[[str], None]) -> Iterator[None]:
    """While files of a folder are written by whoever, say how far they are.

    Args:
        folder: that they are in; None follows nothing.
        num_bytes: that they will have.
    """
    if folder is None:
        yield
        return
    is_over = threading.Event()
    progress = WorkProgress(what, num_bytes / GIB, "GiB", say)

    def follow() -> None:
        while not is_over.wait(_SECONDS_BETWEEN_LOOKS):
            progress.reach(measure_folder(folder) / GIB)

    thread = threading.Thread(target=follow, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def measure_folder(folder: Path) -> int:
    """Bytes of the files in a folder; 0 where it is not there, or is just being renamed."""
    total = 0
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            with contextlib.suppress(OSError):
                total += path.stat().st_size
    return total
