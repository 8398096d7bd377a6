"""A training that makes no progress is ended, with the stacks of all processes and the name of the silent one.

Every process looks for a stop after each step and each batch of an evaluation, and thereby shows that it is alive. Where
one did not for `hang_timeout_seconds`, the others wait for it as well, so all of them run into the limit. A thread of
each then writes its stacks to `hangs/` in the run directory, and the first process says who was silent. What has no such
rhythm, which is the start from the joining of the group on, the first step and saves, may take `PATIENCE` times as long.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

# The start, the first step (which may compile) and a save may each take that many times longer than a step.
PATIENCE = 10.0

# After SIGTERM a process may wait for another one that is dead already.
_SECONDS_AFTER_SIGTERM = 20.0

# What a start may take when its launcher has died: that held the store in which processes find each other.
_SECONDS_WITHOUT_LAUNCHER = 10.0

# The descriptor: `sys.stderr` may be an object without one, as in a notebook or a test, and this thread would die of that.
_STANDARD_ERROR = 2

# How long the first process waits for the others' stacks.
_SECONDS_OF_ROLL_CALL = 10.0

_COLLECTIVES = (os.path.join("torch", "distributed", ""), os.path.join("torch", "nn", "parallel", "distributed.py"))

# A collective on a GPU returns at once; its result is waited for where it is read: in these functions, by the end of the
# file's path. `.cpu()` and its like are native and have no frame of their own.
_WAITS_FOR_DEVICE = (
    ("_engine_run_backward", os.path.join("torch", "autograd", "graph.py")),
    ("_write_step", os.path.join("training", "record", "reporter.py")),
    ("<genexpr>", os.path.join("training", "record", "evaluation.py")),
    ("_pad_across_processes", os.path.join("accelerate", "utils", "operations.py")),
    ("synchronize", os.path.join("torch", "accelerator", "__init__.py")),
)

_TRAINING = Path(__file__).resolve().parents[1]


class Watchdog:
    """Ends this process when `beat` is not called for too long. Used as a context, in the main thread.

    Args:
        folder: where the stacks of all processes go.
        process: this process's number.
        num_processes: how many there are.
        timeout_seconds: the longest that a step or a batch of an evaluation may take.
        tell: called with the one message, by the process that speaks.
        is_orphan: whether this process's launcher is gone.
    """

    def __init__(
        self,
        folder: Path,
        process: int,
        num_processes: int,
        timeout_seconds: float,
        tell: Callable[[str], None],
        is_orphan: Callable[[], bool] = lambda: False,
    ) -> None:
        self._folder = folder
        self._process = process
        self._num_processes = num_processes
        self._timeout_seconds = timeout_seconds
        self._tell = tell
        self._is_orphan = is_orphan
        self._orphaned_at: float | None = None
        self._patience = PATIENCE  # Until the first beat.
        self._last_beat = time.monotonic()
        self._longest_seconds = 0.0
        self._num_beats = 0
        self._is_hurried = False
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    @property
    def collective_timeout(self) -> timedelta:
        """For the process group: longer than the longest limit here, or its bare exception would come first."""
        return timedelta(seconds=(PATIENCE + 1) * self._timeout_seconds)

    def beat(self) -> None:
        """Say that this process is alive."""
        now = time.monotonic()
        if self._num_beats:
            self._longest_seconds = max(self._longest_seconds, now - self._last_beat)
        else:
            self._patience = 1.0
        self._num_beats += 1
        self._last_beat = now

    def hurry(self) -> None:
        """From now on wait only seconds: somebody ends this training, perhaps because another process died."""
        self._is_hurried = True
        self._last_beat = time.monotonic()

    @contextlib.contextmanager
    def patiently(self) -> Iterator[None]:
        """Allow what stands inside to take longer than a step."""
        before, self._patience = self._patience, PATIENCE
        try:
            yield
        finally:
            self._patience, self._last_beat = before, time.monotonic()

    def start(self) -> None:
        """Begin to watch, before a context is entered: the processes may wait for each other while they are built."""
        self._own_file.unlink(missing_ok=True)
        self._last_beat = time.monotonic()
        self._thread.start()

    def stop(self) -> None:
        """Watch no longer."""
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

    @property
    def _own_file(self) -> Path:
        return self._folder / f"process_{self._process:05d}.txt"

    def _limit_seconds(self) -> float:
        limit = self._timeout_seconds
        if self._is_hurried:
            limit = min(limit, max(_SECONDS_AFTER_SIGTERM, 2 * self._longest_seconds))
        return limit * self._patience

    def _watch(self) -> None:
        try:
            while not self._is_over.wait(min(1.0, self._timeout_seconds / 10)):
                self._look_for_launcher()
                if time.monotonic() - self._last_beat > self._limit_seconds():
                    self._end_process()
                # Should native code keep this thread from running as well, the interpreter's own watchdog is left.
                limit_seconds = self._limit_seconds() + 2 * _SECONDS_OF_ROLL_CALL
                faulthandler.dump_traceback_later(limit_seconds, exit=True, file=_STANDARD_ERROR)
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _look_for_launcher(self) -> None:
        """End a start that waits for others in vain; from the first step on, a stop is agreed on instead."""
        if self._num_beats or not self._is_orphan():
            return
        now = time.monotonic()
        self._orphaned_at = self._orphaned_at or now
        if now - self._orphaned_at > _SECONDS_WITHOUT_LAUNCHER:
            self._say(
                f"process {self._process}: the launcher died before the first step, and what this process waits for will "
                "not come. Nothing is lost: start it again"
            )
            os._exit(1)

    def _end_process(self) -> None:
        seconds = time.monotonic() - self._last_beat
        try:
            self._report(seconds)
        except Exception as error:  # Whatever is wrong, as with a full disk: nobody waits for this process any longer.
            self._say(
                f"process {self._process} made no progress for {seconds:.0f} seconds (hang_timeout_seconds). Its stacks "
                f"could not be written to {self._folder} and stand below: {error}. Start it again to go on from the last "
                "checkpoint"
            )
            faulthandler.dump_traceback(_STANDARD_ERROR, all_threads=True)
        finally:
            os._exit(1)

    def _say(self, message: str) -> None:
        with contextlib.suppress(OSError):  # Who read it may have died as well.
            print(f"onecurve: {message}", file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):
            self._tell(message)

    def _report(self, seconds: float) -> None:
        frames = list(_frames_of_main_thread())
        self._folder.mkdir(parents=True, exist_ok=True)
        staging = self._own_file.with_suffix(".tmp")
        with staging.open("w", encoding="utf-8") as file:
            file.write(json.dumps({"is_waiting": _is_waiting(frames), "place": _describe_place(frames)}) + "\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        staging.rename(self._own_file)
        reports = self._call_roll()
        if self._process == min(reports):
            self._say(describe_hang(reports, self._num_processes, seconds, self._folder))
        else:  # The one that speaks ends first, and the launcher then ends this one.
            self._is_over.wait(_SECONDS_OF_ROLL_CALL)

    def _call_roll(self) -> dict[int, dict[str, Any]]:
        """What each process wrote; those that wrote nothing are missing."""
        deadline = time.monotonic() + _SECONDS_OF_ROLL_CALL
        reports: dict[int, dict[str, Any]] = {}
        while len(reports) < self._num_processes and time.monotonic() < deadline:
            for path in self._folder.glob("process_*.txt"):
                process = int(path.stem.partition("_")[2])
                if process < self._num_processes:  # An earlier training here may have had more.
                    reports[process] = json.loads(path.read_text(encoding="utf-8").split("\n")[0])
            time.sleep(0.05)
        return reports


def describe_hang(reports: dict[int, dict[str, Any]], num_processes: int, seconds: float, folder: Path) -> str:
    """The one message: who was silent, where, and where the stacks are.

    Args:
        reports: what each process wrote of itself: `is_waiting` for the others, and its `place` in the code.
    """
    missing = [process for process in range(num_processes) if process not in reports]
    silent = [process for process, report in reports.items() if not report["is_waiting"]]
    if missing:
        who = f"{_name(missing)} did not answer at all"
    elif num_processes == 1 or (silent and len(silent) < num_processes):
        who = "; ".join(
            f"process {process} is silent at {reports[process]['place']}" for process in sorted(silent or [0])
        )
    else:
        who = "which process holds up the others can't be told"
    return (
        f"no progress for {seconds:.0f} seconds (hang_timeout_seconds): {who}. The stacks of all processes are in "
        f"{folder}. Start it again to go on from the last checkpoint; if steps take that long, raise hang_timeout_seconds"
    )


def _name(processes: list[int]) -> str:
    return f"process{'es' if len(processes) > 1 else ''} {', '.join(map(str, processes))}"


def _frames_of_main_thread() -> Iterator[FrameType]:
    """From the innermost outwards."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_waiting(frames: list[FrameType]) -> bool:
    """Whether this process waits for the others: in a collective, in a backward that reduces, or for the device.

    Args:
        frames: from the innermost outwards.
    """
    innermost = frames[0].f_code
    return any(part in innermost.co_filename for part in _COLLECTIVES) or any(
        innermost.co_name == name and innermost.co_filename.endswith(path) for name, path in _WAITS_FOR_DEVICE
    )


def _describe_place(frames: list[FrameType]) -> str:
    for frame in frames:
        path = Path(frame.f_code.co_filename).resolve()
        if path.is_relative_to(_TRAINING):
            return f"{path.relative_to(_TRAINING.parent)}:{frame.f_lineno} ({frame.f_code.co_name})"
    return "an unknown place"
