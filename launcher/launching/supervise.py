"""Start `accelerate launch`, stay its parent, turn signals into a stop, and return the training's own exit code.

accelerate flattens exit codes, and a signal to torch's elastic agent orphans or kills its workers. So the launched
processes live in a process group of their own, which no terminal or scheduler signals; a stop reaches them as a file,
and how they ended is read from the status file that the training writes.
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
from onecurve.launcher.launching.stop import Stop, StopWords
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

# After these, another start would end the same way, or has nothing to do: finished, bad input, diverged, preempted.
FINAL_EXIT_CODES = frozenset({FINISHED, BAD_INPUT, DIVERGED, PREEMPTED})

# From the end of the processes on another machine to the last word of the first.
_SECONDS_FOR_FIRST_MACHINE = 10.0


def supervise(
    command: Command,
    run_directory: Path | None,
    shows_everything: bool = False,
    words: StopWords | None = None,
    keeps_stdout: bool = False,
) -> Ending:
    """Run one launch to its end.

    Args:
        words: for the stop of what is no training.
        keeps_stdout: leave stdout to a program's JSON; what the training prints there goes to stderr.
        run_directory: where to look for the status on machines other than the first, which alone is told it directly,
            unless $ONECURVE_STATUS_FILE names a file that all machines see. $ONECURVE_STOP_FILE is obeyed likewise.
        shows_everything: let the launching tools' own tracebacks through.
    """
    folder = Path(tempfile.mkdtemp(prefix="onecurve-"))
    words = words or StopWords()
    try:
        is_first = read_machine_rank(command) == 0
        stop = Stop(Path(os.environ.get(STOP_FILE, folder / "STOP")), words)
        status_file = Path(os.environ.get(STATUS_FILE, folder / "status.json"))
        if not is_first and STATUS_FILE not in os.environ and run_directory is not None:
            status_file = RunDirectory(run_directory).status
        variables = {
            **os.environ,
            **command.environment,
            STATUS_FILE: str(status_file),
            STOP_FILE: str(stop.path),
            NUM_PROCESSES: str(command.num_processes),
            # Told to end, torch's agent kills its processes after that time: long enough for a checkpoint. Those that wait
            # for a dead one end by themselves.
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "120"),
        }
        before = _read_version(status_file)
        with stop.listening():
            return_code = run_to_end(command, variables, stop, shows_everything, keeps_stdout)
        if not is_first:
            if return_code == 0:  # The first machine may still be writing the model, and answers for that itself.
                return Ending(FINISHED, was_stopped=stop.was_asked)
            _wait_for_ending(status_file, before)
        status = read_status(status_file) if _read_version(status_file) != before else None
        if stop.was_forced and (status is None or status.get("exit_code") is None):
            return Ending(FAILED, f"ended at once, as asked; {words.lost}", was_stopped=True)
        return judge(return_code, status, stop.was_asked)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def read_machine_rank(command: Command) -> int:
    """Which of several machines this is, as the command tells accelerate; 0 on one machine."""
    words = command.words
    return int(words[words.index("--machine_rank") + 1]) if "--machine_rank" in words else 0


def _read_version(path: Path) -> int | None:
    """Tells a status of this start from one that an earlier start has left."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


def _wait_for_ending(path: Path, before: int | None) -> None:
    """Give the first machine time to say how the training ended; processes here may end a little earlier."""
    deadline = time.monotonic() + _SECONDS_FOR_FIRST_MACHINE
    while time.monotonic() < deadline:
        status = read_status(path)
        if _read_version(path) != before and status is not None and status.get("exit_code") is not None:
            return
        time.sleep(0.1)


def supervise_with_restarts(start: Callable[[int], Ending], max_restarts: int, say: Callable[[str], None]) -> Ending:
    """Start again after a crash, at most `max_restarts` times, each from the last checkpoint.

    Args:
        start: runs one launch; its argument counts from 0.
    """
    for attempt in range(max_restarts + 1):
        ending = start(attempt)
        is_final = ending.exit_code in FINAL_EXIT_CODES and not ending.was_orphaned
        if is_final or ending.was_stopped or attempt == max_restarts:
            return ending
        say(f"{ending.message or 'it crashed'}; restart {attempt + 1} of {max_restarts} from the last checkpoint")
    raise AssertionError("the last attempt returns")
