"""What can end a run, and how it is told: one message on stderr, a status file, an exit code.

::

    Exception
    ├── RecipeError        2   training/config.py: the recipe is wrong, all problems at once
    └── Fault              1
        ├── BadInput       2   data, model or machine can't do what the recipe asks
        ├── WrongTopology  2   the processes that came up are not those that were asked for
        ├── LostLauncher   1   the launcher died before the first step
        ├── Diverged       3   the loss is not a number any more
        └── Preempted     75   asked to stop; a good checkpoint was written (or, by predict, nothing)

Anything else is a bug or the machine: its traceback is shown, exit code 1.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NoReturn

from onecurve.training.recipe import RecipeError

State = Literal["running", "finished", "preempted", "failed"]

# Each asks for a checkpoint and an end. SIGHUP is what a lost terminal sends, and torch's agent passes it on.
STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP") if hasattr(signal, name)
)

# How long a rank other than 0 lets rank 0 find the same fault and print it before it leaves itself.
_SECONDS_FOR_MAIN_TO_SPEAK = 60.0

# As long after a stop, on which all have agreed. Whoever asked torch's agent for it waits for every rank.
_SECONDS_FOR_MAIN_TO_SAY_STOPPED = 5.0

_DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EPERM, errno.EACCES})

# gloo and NCCL raise bare RuntimeErrors when a peer is gone.
_LOST_CONNECTIONS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Socket Timeout",
    "pair closure",
    "NCCL communicator was aborted",
    "remote process exited",
)


class Fault(Exception):
    """A stop with a cause that the user can read; `exit_code` is what the process returns."""

    exit_code = 1
    is_of_one_process = False  # Of one that must speak for itself: rank 0 will not find it.


class BadInput(Fault):
    """Data, model or machine can't do what the recipe asks."""

    exit_code = 2


class WrongTopology(Fault):
    """The processes that came up are not those that were asked for."""

    exit_code = 2


class LostLauncher(Fault):
    """The launcher died before the first step: nobody ends the processes that are left, so each speaks and ends itself."""

    is_of_one_process = True

    def __init__(self) -> None:
        super().__init__("the launcher died before the first step. Nothing is lost: start it again")


class Diverged(Fault):
    """The loss is not finite."""

    exit_code = 3


class Preempted(Fault):
    """Asked to stop: a training can go on from its last checkpoint, a labelling can be started again."""

    exit_code = 75


def is_main_process() -> bool:
    """Whether this process speaks for all; known from the environment, before any process group exists."""
    return int(os.environ.get("RANK", "0")) == 0


# Read as early as can be (run.py imports this module first): a launcher that is dead by now will not be missed.
_LAUNCHER = os.getppid()


def launcher_is_gone() -> bool:
    """Whether the process that started this one has died, so that nobody minds it any more."""
    return os.getppid() != _LAUNCHER


def check_launcher() -> None:
    """Look whether the launcher lives: in what takes long before the first step, as there nobody agrees on a stop.

    Raises:
        LostLauncher: it died.
    """
    if launcher_is_gone():
        raise LostLauncher


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by `text` in one step: a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            os.fchmod(file.fileno(), 0o644)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@dataclass
class Outcome:
    """Where the status of this run is told: `$ONECURVE_STATUS_FILE`, and the run directory once there is one."""

    status_files: list[Path] = field(
        default_factory=lambda: (
            [Path(os.environ["ONECURVE_STATUS_FILE"])] if "ONECURVE_STATUS_FILE" in os.environ else []
        )
    )
    step: int = 0

    def follow(self, path: Path, step: int) -> None:
        """From now on the status goes to the run directory as well."""
        self.status_files.append(path)
        self.step = step
        self.tell("running")

    def say(self, message: str | None) -> None:
        """Print a line, once for all processes."""
        if message and is_main_process():
            print(message, flush=True)

    def tell(self, state: State, exit_code: int | None = None, message: str = "") -> None:
        """Write the status everywhere, atomically; rank 0 only."""
        if not is_main_process():
            return
        status: dict[str, Any] = {"state": state, "exit_code": exit_code, "step": self.step, "message": message}
        restarts_left = int(os.environ.get("ONECURVE_RESTARTS_LEFT", "0"))
        if exit_code == Fault.exit_code and restarts_left > 0:  # Of the other endings none is tried again.
            status["restarts_left"] = restarts_left
        for path in self.status_files:
            write_atomically(path, json.dumps(status) + "\n")


def report_outcome(main: Callable[[Sequence[str], Outcome], None], arguments: Sequence[str]) -> int:
    """Run `main`, tell how it ended, and return the exit code."""
    outcome = Outcome()
    try:
        main(arguments, outcome)
    except (Fault, RecipeError) as error:
        exit_code = error.exit_code if isinstance(error, Fault) else 2
        message = str(error)
        _tell_safely(outcome, "preempted" if isinstance(error, Preempted) else "failed", exit_code, message)
        if is_main_process() or (isinstance(error, Fault) and error.is_of_one_process):
            print(f"onecurve: {message}", file=sys.stderr, flush=True)
        else:
            is_agreed = isinstance(error, Preempted)
            _wait_for_main(_SECONDS_FOR_MAIN_TO_SAY_STOPPED if is_agreed else _SECONDS_FOR_MAIN_TO_SPEAK)
        return exit_code
    except KeyboardInterrupt as error:
        _tell_interrupted(outcome, str(error))
        return 1
    except Exception as error:
        explanation = _explain(error)
        _tell_safely(outcome, "failed", 1, explanation or f"{type(error).__name__}: {error}")
        if explanation is not None:
            print(f"onecurve: {explanation}", file=sys.stderr, flush=True)
        else:
            # Every rank shows its own traceback: the first to fail holds the cause, and it need not be rank 0.
            traceback.print_exc()
        return 1
    _tell_safely(outcome, "finished", 0, "")
    return 0


def end_at_once(outcome: Outcome) -> NoReturn:
    """End this process from whatever thread, whatever the others do."""
    _tell_interrupted(outcome)
    os._exit(1)


def _tell_interrupted(outcome: Outcome, message: str = "") -> None:
    message = (
        message or "ended at once, as asked; what was done after the last checkpoint is lost. Start it again to go on"
    )
    _tell_safely(outcome, "failed", 1, message)
    if is_main_process():
        print(f"onecurve: {message}", file=sys.stderr, flush=True)


def _explain(error: Exception) -> str | None:
    """What the machine did, if this error is the machine's; None for a bug, whose traceback is wanted."""
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        name = error.filename or "a file of output_dir"
        return f"{name}: {error.strerror}. What was saved before is whole: mend the disk and start it again to go on"
    if isinstance(error, RuntimeError) and "out of memory" in str(error):
        return (
            f"out of memory outside of a step's forward and backward: {str(error).splitlines()[0]} Lower "
            "per_device_batch_size, or shard the model (docs/topologies.md), and start it again"
        )
    if isinstance(error, RuntimeError) and any(text in str(error) for text in _LOST_CONNECTIONS):
        return (
            f"process {os.environ.get('RANK', '0')} lost its connection to another process, which died (killed, or out of "
            "memory) or failed; what it said stands above, if it could. Start it again to go on from the last checkpoint"
        )
    return None


def _tell_safely(outcome: Outcome, state: State, exit_code: int, message: str) -> None:
    try:
        outcome.tell(state, exit_code, message)
    except OSError as error:
        print(f"onecurve: the status could not be written: {error}", file=sys.stderr)


def _wait_for_main(seconds: float) -> None:
    """Stay until the launcher, told by rank 0's exit, ends this rank: the first rank to exit silences the others.

    Every rank finds the same fault, but not at the same moment. A rank on another machine has a launcher of its own, which
    rank 0's does not hear of, and is free to leave. So is each after `seconds`: an agent that was signalled itself has told
    its ranks already, and waits for them to leave.
    """
    if os.environ.get("GROUP_RANK", "0") != "0":
        return
    ended = threading.Event()

    def end(signum: int, frame: FrameType | None) -> None:
        ended.set()

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, end)
    deadline = time.monotonic() + seconds
    while not (ended.wait(0.1) or launcher_is_gone() or time.monotonic() > deadline):
        pass
