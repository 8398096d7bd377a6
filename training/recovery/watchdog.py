"""The watchdog ends a training that makes no progress, and reports which rank is stuck and where.

Every rank looks for a stop after each step and each batch of an evaluation; that is its heartbeat. If one rank has no
heartbeat for `hang_timeout_seconds`, the others wait for it in a collective, so all of them reach the limit. Then a thread
in each rank writes a stack dump to `hangs/` in the run directory, and the first rank reports the hang.

Slow phases have no regular heartbeat: the start (from the joining of the process group on), the first step, and saves.
They may take `SLOW_PHASE_FACTOR` times as long.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import TracebackType

from onecurve.training.recovery.hang_report import HangReports, describe_failed_join, describe_hang

SLOW_PHASE_FACTOR = 10.0
"""How many times longer than a step the start, the first step (which may compile) and a save may each take."""

# After SIGTERM, this rank may be waiting for a rank that is already dead, which will not report. torch's agent, which sends the
# signal when a rank dies, kills those that are left after 30 seconds: what is said here has to be said before.
_SECONDS_AFTER_SIGTERM = 12.0
_SECONDS_FOR_REPORTS_AFTER_SIGTERM = 6.0

# The launcher hosts the store through which ranks find each other, so a start without it cannot succeed.
_SECONDS_WITHOUT_LAUNCHER = 10.0

# The descriptor: in a notebook or a test, `sys.stderr` has none, and faulthandler would raise an error in this thread.
_STANDARD_ERROR = 2


class Watchdog:
    """Ends this process if `beat` is not called for too long. Used as a context, in the main thread.

    Args:
        folder: where the stack dumps of all ranks go.
        rank: this process's rank.
        num_processes: how many ranks there are.
        timeout_seconds: the longest that a step or a batch of an evaluation may take.
        report: called with the error message, by the rank that reports.
        has_lost_launcher: whether this process's launcher has died.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        num_processes: int,
        timeout_seconds: float,
        report: Callable[[str], None],
        has_lost_launcher: Callable[[], bool] = lambda: False,
    ) -> None:
        self._reports = HangReports(folder, rank, num_processes)
        self._rank = rank
        self._timeout_seconds = timeout_seconds
        self._report = report
        self._has_lost_launcher = has_lost_launcher
        self._lost_launcher_at: float | None = None
        self._factor = SLOW_PHASE_FACTOR  # Until the first heartbeat.
        self._last_beat = time.monotonic()
        self._longest_seconds = 0.0
        self._num_beats = 0
        self._is_limit_short = False
        self._join_timeout_seconds: float | None = None
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def choose_collective_timeout(self, join_timeout_seconds: float) -> timedelta:
        """For the process group: longer than every limit here, so that the watchdog's report comes before torch's error.

        Args:
            join_timeout_seconds: the limit of `joining`.
        """
        return timedelta(seconds=max((SLOW_PHASE_FACTOR + 1) * self._timeout_seconds, 2 * join_timeout_seconds))

    def beat(self) -> None:
        """The heartbeat of this rank."""
        now = time.monotonic()
        if self._num_beats:
            self._longest_seconds = max(self._longest_seconds, now - self._last_beat)
        else:
            self._factor = 1.0
        self._num_beats += 1
        self._last_beat = now

    def shorten_limit(self) -> None:
        """Wait only seconds from now on: this rank received SIGTERM, perhaps because another rank died."""
        self._is_limit_short = True
        self._last_beat = time.monotonic()

    @contextlib.contextmanager
    def slow_phase(self) -> Iterator[None]:
        """Allow the code inside to take longer than a step."""
        before, self._factor = self._factor, SLOW_PHASE_FACTOR
        try:
            yield
        finally:
            self._factor, self._last_beat = before, time.monotonic()

    @contextlib.contextmanager
    def joining(self, timeout_seconds: float) -> Iterator[None]:
        """While the ranks find each other: a limit of its own, and a report that says what to check."""
        self._join_timeout_seconds, self._last_beat = timeout_seconds, time.monotonic()
        try:
            yield
        finally:
            self._join_timeout_seconds, self._last_beat = None, time.monotonic()

    def start(self) -> None:
        """Start to watch before the context is entered: ranks may already wait for each other while they are built."""
        self._reports.remove_own()
        self._last_beat = time.monotonic()
        self._thread.start()

    def stop(self) -> None:
        """Stop watching."""
        self._is_over.set()
        if self._thread.is_alive():
            self._thread.join()

    def __enter__(self) -> Watchdog:
        if not self._thread.is_alive():
            self.start()
        self._last_beat = time.monotonic()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def _limit_seconds(self) -> float:
        if self._join_timeout_seconds is not None:
            return self._join_timeout_seconds
        limit = self._timeout_seconds
        if self._is_limit_short:
            limit = min(limit, max(_SECONDS_AFTER_SIGTERM, 2 * self._longest_seconds))
        return limit * self._factor

    def _watch(self) -> None:
        try:
            while not self._is_over.wait(min(1.0, self._timeout_seconds / 10)):
                self._check_launcher()
                if time.monotonic() - self._last_beat > self._limit_seconds():
                    self._end_process()
                # If native code holds the interpreter's lock, this thread cannot run. faulthandler's own thread still can.
                limit_seconds = self._limit_seconds() + 2 * HangReports.TIMEOUT_SECONDS
                faulthandler.dump_traceback_later(limit_seconds, exit=True, file=_STANDARD_ERROR)
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _check_launcher(self) -> None:
        """End a start that has lost its launcher. From the first step on, ranks agree on a stop instead."""
        if self._num_beats or not self._has_lost_launcher():
            return
        now = time.monotonic()
        self._lost_launcher_at = self._lost_launcher_at or now
        if now - self._lost_launcher_at > _SECONDS_WITHOUT_LAUNCHER:
            self._print_and_report(
                f"rank {self._rank}: the launcher died before the first step, so the other ranks cannot be reached. Nothing is "
                "lost: start it again"
            )
            os._exit(1)

    def _end_process(self) -> None:
        seconds = time.monotonic() - self._last_beat
        try:
            self._reports.write_own()
            is_joining = self._join_timeout_seconds is not None
            patience = _SECONDS_FOR_REPORTS_AFTER_SIGTERM if self._is_limit_short else HangReports.TIMEOUT_SECONDS
            describe = describe_failed_join if is_joining else describe_hang
            message = self._reports.describe_if_first(seconds, describe, patience)
            if message is not None:
                self._print_and_report(message)
            else:  # When the reporting rank exits, the launcher ends this one.
                self._is_over.wait(patience)
        except Exception as error:  # Such as a full disk. Whatever it is, this process must end.
            self._print_and_report(
                f"rank {self._rank} made no progress for {seconds:.0f} seconds (hang_timeout_seconds). Its stack dump could "
                f"not be written to {self._reports.folder} and follows here: {error}. Start it again to resume from the last "
                "checkpoint"
            )
            faulthandler.dump_traceback(_STANDARD_ERROR, all_threads=True)
        finally:
            os._exit(1)

    def _print_and_report(self, message: str) -> None:
        with contextlib.suppress(OSError):  # The process that reads stderr may have died as well.
            print(f"onecurve: {message}", file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):
            self._report(message)
