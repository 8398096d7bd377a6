"""How a run ends: an exit code, one message on stderr, and a status file. errors.py has the exit codes."""

from __future__ import annotations

from onecurve.training.process import is_main_process, launcher_has_died  # isort: split

import contextlib
import errno
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NoReturn

from onecurve.training import launch_protocol
from onecurve.training.atomic_files import write_atomically
from onecurve.training.errors import Fault, Preempted, has_lost_connection
from onecurve.training.recipe import RecipeError

State = Literal["running", "finished", "preempted", "failed"]

# When rank 0 exits first, the launcher ends the other ranks. So a rank that has an error too waits this long for rank 0 to
# report it.
_SECONDS_FOR_MAIN_TO_REPORT = 60.0

# After a stop, all ranks have agreed on it, and whoever stopped torch's agent waits for every rank to exit.
_SECONDS_FOR_MAIN_TO_REPORT_STOP = 5.0

_DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EPERM, errno.EACCES})


def _status_files_from_environment() -> list[Path]:
    path = os.environ.get(launch_protocol.STATUS_FILE)
    return [] if path is None else [Path(path)]


@dataclass
class Outcome:
    """Where the status of this run is written: `$ONECURVE_STATUS_FILE`, and the run directory once it exists."""

    status_files: list[Path] = field(default_factory=_status_files_from_environment)
    step: int = 0

    def add_status_file(self, path: Path, step: int) -> None:
        """Write the status to `path` as well from now on, beginning with "running"."""
        self.status_files.append(path)
        self.step = step
        self.write_status("running")

    def print_once(self, message: str | None) -> None:
        """Print a line on rank 0."""
        if message and is_main_process():
            print(message, flush=True)

    def write_status(self, state: State, exit_code: int | None = None, message: str = "") -> None:
        """Write the status to every status file, atomically; only rank 0 does."""
        if not is_main_process():
            return
        status: dict[str, Any] = {"state": state, "exit_code": exit_code, "step": self.step, "message": message}
        restarts_left = int(os.environ.get(launch_protocol.RESTARTS_LEFT, "0"))
        if exit_code == Fault.exit_code and restarts_left > 0:  # The launcher retries only crashes.
            status["restarts_left"] = restarts_left
        for path in self.status_files:
            write_atomically(path, json.dumps(status) + "\n")


def report_outcome(main: Callable[[Sequence[str], Outcome], None], arguments: Sequence[str]) -> int:
    """Run `main`, report how it ended, and return the exit code."""
    outcome = Outcome()
    try:
        main(arguments, outcome)
    except (Fault, RecipeError) as error:
        exit_code = error.exit_code if isinstance(error, Fault) else launch_protocol.BAD_INPUT
        message = str(error)
        _try_to_write_status(outcome, "preempted" if isinstance(error, Preempted) else "failed", exit_code, message)
        if is_main_process() or (isinstance(error, Fault) and error.is_of_one_rank):
            print(f"onecurve: {message}", file=sys.stderr, flush=True)
        else:
            is_stop = isinstance(error, Preempted)
            _wait_for_main(_SECONDS_FOR_MAIN_TO_REPORT_STOP if is_stop else _SECONDS_FOR_MAIN_TO_REPORT)
        return exit_code
    except KeyboardInterrupt as error:
        _report_interrupt(outcome, str(error))
        return launch_protocol.FAILED
    except Exception as error:
        explanation = _explain(error)
        _try_to_write_status(
            outcome, "failed", launch_protocol.FAILED, explanation or f"{type(error).__name__}: {error}"
        )
        if explanation is not None:
            print(f"onecurve: {explanation}", file=sys.stderr, flush=True)
        else:
            # Every rank prints its traceback: the rank that failed first has the cause, and it need not be rank 0.
            traceback.print_exc()
        return launch_protocol.FAILED
    _try_to_write_status(outcome, "finished", launch_protocol.FINISHED, "")
    return launch_protocol.FINISHED


def end_process(exit_code: int) -> NoReturn:
    """End this process with what `report_outcome` returned; every script's last line.

    Python's own end frees what native code still uses. gloo's threads outlive their process group, and one that lets go of
    a tensor while Python ends aborts the process ("terminate called without an active exception"), after all its work.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # Its reader has ended.
            stream.flush()
    os._exit(exit_code)


def end_immediately(outcome: Outcome) -> NoReturn:
    """End this process from any thread, without waiting for the other ranks."""
    _report_interrupt(outcome)
    os._exit(launch_protocol.FAILED)


def _report_interrupt(outcome: Outcome, message: str = "") -> None:
    message = message or (
        "interrupted without a checkpoint; steps after the last one are lost. Start it again to resume from there"
    )
    _try_to_write_status(outcome, "failed", launch_protocol.FAILED, message)
    if is_main_process():
        print(f"onecurve: {message}", file=sys.stderr, flush=True)


def _explain(error: Exception) -> str | None:
    """What failed on the machine, or None for a bug, which needs its traceback."""
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        name = error.filename or "a file of output_dir"
        return f"{name}: {error.strerror}. Earlier checkpoints are intact: free or repair the disk, and start it again to resume"
    if isinstance(error, RuntimeError) and "out of memory" in str(error):
        return (
            f"out of memory outside of a step's forward and backward: {str(error).splitlines()[0]} Lower "
            "per_device_batch_size, or shard the model (docs/topologies.md), and start it again"
        )
    if has_lost_connection(error):
        return (
            f"rank {os.environ.get('RANK', '0')} lost its connection to another rank, which failed or was killed (perhaps "
            "because the host ran out of memory). If it printed an error, that is above. Start it again to resume from the "
            "last checkpoint"
        )
    return None


def _try_to_write_status(outcome: Outcome, state: State, exit_code: int, message: str) -> None:
    try:
        outcome.write_status(state, exit_code, message)
    except OSError as error:
        print(f"onecurve: the status could not be written: {error}", file=sys.stderr)


def _wait_for_main(seconds: float) -> None:
    """Wait until rank 0 has reported the error and the launcher ends this rank.

    All ranks have the same error, but not at the same moment, and once one rank exits, the launcher ends the others: rank 0
    would be killed before it reports. Ranks on other machines have another launcher, so they need not wait. The wait is
    limited because an agent that was itself signalled has already signalled its ranks and waits for them to exit.
    """
    if os.environ.get("GROUP_RANK", "0") != "0":
        return
    ended = threading.Event()

    def end(signum: int, frame: FrameType | None) -> None:
        ended.set()

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, end)
    deadline = time.monotonic() + seconds
    while not (ended.wait(0.1) or launcher_has_died() or time.monotonic() > deadline):
        pass
