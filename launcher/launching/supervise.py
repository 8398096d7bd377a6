"""Start `accelerate launch`, supervise it, turn signals into a stop, and return the training's own exit code.

accelerate replaces every exit code but 0 by 1, and a signal to torch's elastic agent orphans or kills its workers. So the
processes are started in a process group of their own, which gets no signals from a terminal or a scheduler; a file asks
them to stop, and how they ended is read from the status file that the training writes.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from onecurve.launcher.launching.command import Command
from onecurve.launcher.launching.ending import Ending, judge, read_status
from onecurve.launcher.launching.process import run_to_end
from onecurve.launcher.launching.stop import Stop, StopMessages
from onecurve.training.launch_protocol import (
    BAD_INPUT,
    DIVERGED,
    FAILED,
    FINISHED,
    NUM_PROCESSES,
    PREEMPTED,
    STATUS_FILE,
    STOP_FILE,
)
from onecurve.training.run_directory import RunDirectory

# After these there is no restart: it would end the same way, or has nothing to do.
FINAL_EXIT_CODES = frozenset({FINISHED, BAD_INPUT, DIVERGED, PREEMPTED})

# How long other machines wait for the final status of the first one after their own processes have ended.
_SECONDS_FOR_FIRST_MACHINE = 10.0


def supervise(
    command: Command,
    run_directory: Path | None,
    shows_everything: bool = False,
    messages: StopMessages | None = None,
    keeps_stdout: bool = False,
) -> Ending:
    """Run one launch to its end.

    Args:
        run_directory: where machines other than the first read the status, unless $ONECURVE_STATUS_FILE names a file that
            all machines see. A $ONECURVE_STOP_FILE that is set is used as well.
        shows_everything: do not filter the tracebacks of the launching tools.
        messages: what is printed about a stop; by default for a training.
        keeps_stdout: leave stdout to a program's JSON; what the training prints there goes to stderr.
    """
    folder = Path(tempfile.mkdtemp(prefix="onecurve-"))
    messages = messages or StopMessages()
    try:
        is_first = read_machine_rank(command) == 0
        stop = Stop(Path(os.environ.get(STOP_FILE, folder / "STOP")), messages)
        status_file = Path(os.environ.get(STATUS_FILE, folder / "status.json"))
        if not is_first and STATUS_FILE not in os.environ and run_directory is not None:
            status_file = RunDirectory(run_directory).status
        variables = {
            **os.environ,
            **command.environment,
            STATUS_FILE: str(status_file),
            STOP_FILE: str(stop.path),
            NUM_PROCESSES: str(command.num_processes),
            # torch's agent kills its processes this long after it asked them to end: enough for a checkpoint. Processes
            # that wait for a dead one end earlier by themselves.
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "120"),
        }
        before = _read_version(status_file)
        with stop.listening():
            return_code = run_to_end(command, variables, stop, shows_everything, keeps_stdout)
        if not is_first:
            if return_code == 0:  # The first machine may still be writing the model; it reports that itself.
                return Ending(FINISHED, was_stopped=stop.was_asked)
            _wait_for_ending(status_file, before)
        status = read_status(status_file) if _read_version(status_file) != before else None
        if stop.was_forced and (status is None or status.get("exit_code") is None):
            return Ending(FAILED, f"ended at once, as requested; {messages.lost}", was_stopped=True)
        return judge(return_code, status, stop.was_asked)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def read_machine_rank(command: Command) -> int:
    """The machine rank in the command; 0 on a single machine."""
    words = command.words
    return int(words[words.index("--machine_rank") + 1]) if "--machine_rank" in words else 0


def _read_version(path: Path) -> int | None:
    """The time of its last change, which tells a status of this start from one of an earlier start."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


def _wait_for_ending(path: Path, before: int | None) -> None:
    """Wait for the first machine to write how the training ended; processes here may end a little earlier."""
    deadline = time.monotonic() + _SECONDS_FOR_FIRST_MACHINE
    while time.monotonic() < deadline:
        status = read_status(path)
        if _read_version(path) != before and status is not None and status.get("exit_code") is not None:
            return
        time.sleep(0.1)


def supervise_with_restarts(
    start: Callable[[int, int], Ending], max_restarts: int, report: Callable[[str], None]
) -> Ending:
    """Start again after a crash, at most `max_restarts` times, each time from the last checkpoint.

    A start after one whose micro-batches were too large is not counted: each has smaller ones, so there are few.

    Args:
        start: runs one launch; its arguments are how many were before it, and how many restarts are left.
    """
    num_starts, num_restarts = 0, 0
    while True:
        ending = start(num_starts, max_restarts - num_restarts)
        is_final = ending.exit_code in FINAL_EXIT_CODES and not ending.was_orphaned
        if is_final or ending.was_stopped or (num_restarts == max_restarts and not ending.has_shrunk):
            return ending
        num_starts += 1
        num_restarts += not ending.has_shrunk
        which = (
            "restart with smaller micro-batches" if ending.has_shrunk else f"restart {num_restarts} of {max_restarts}"
        )
        report(f"{ending.message or 'the training crashed'}; {which} from the last checkpoint")
