"""Start `accelerate launch`, stay its parent, turn signals into a stop, and return the training's own exit code.

accelerate flattens exit codes, and a signal to torch's elastic agent orphans or kills its workers. So the launched
processes live in a process group of their own, which no terminal or scheduler signals; a stop reaches them as a file,
and how they ended is read from the status file that the training writes.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any

from onecurve.launcher.errors import LaunchFailed
from onecurve.launcher.launching.command import Command

STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name)
)

# After these, another start would end the same way, or has nothing to do: finished, bad input, diverged, preempted.
FINAL_EXIT_CODES = frozenset({0, 2, 3, 75})

# Shells, `timeout` and schedulers signal a process and its group: the same request arrives twice.
_SECONDS_OF_ONE_REQUEST = 0.5

# From the end of the processes on another machine to the last word of the first.
_SECONDS_FOR_FIRST_MACHINE = 10.0

# From the death of accelerate launch to the end of its processes, which notice it after a step and write a checkpoint.
_SECONDS_FOR_ORPHANS = 120.0

_PR_SET_PDEATHSIG = 1

_AGENT_LOG = re.compile(r"[WEI]\d{4} [\d:.]+ +\d+ torch/distributed/")


@dataclass(frozen=True)
class Ending:
    """How a training ended.

    Attributes:
        exit_code: the training's own, or 1 where it could not say.
        message: one line for the user; empty where the training has said it already.
        was_stopped: a signal asked for the end.
        was_orphaned: accelerate launch was killed, and nothing else made the training stop.
        cause: the training's own message about its end; empty where it finished, or could not write one.
    """

    exit_code: int
    message: str = ""
    was_stopped: bool = False
    was_orphaned: bool = False
    cause: str = ""


@dataclass(frozen=True)
class StopWords:
    """What a stop means to those who ask for it, by the first signal and by the second."""

    first: str = "asked the training to write a checkpoint and stop"
    second: str = "ending all processes without a checkpoint"
    lost: str = "what was done after the last checkpoint is lost, `onecurve resume` goes on"


LABELLING = StopWords("asked the labelling to stop", "ending all processes", "nothing is written, start it again")


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
        stop = _Stop(Path(os.environ.get("ONECURVE_STOP_FILE", folder / "STOP")), words)
        status_file = Path(os.environ.get("ONECURVE_STATUS_FILE", folder / "status.json"))
        if not is_first and "ONECURVE_STATUS_FILE" not in os.environ and run_directory is not None:
            status_file = run_directory / "status.json"
        variables = {
            **os.environ,
            **command.environment,
            "ONECURVE_STATUS_FILE": str(status_file),
            "ONECURVE_STOP_FILE": str(stop.path),
            "ONECURVE_NUM_PROCESSES": str(command.num_processes),
            # Told to end, torch's agent kills its processes after that time: long enough for a checkpoint. Those that wait
            # for a dead one end by themselves.
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "120"),
        }
        before = _read_version(status_file)
        with stop.listening():
            return_code = _launch(command, variables, stop, shows_everything, keeps_stdout)
        if not is_first:
            if return_code == 0:  # The first machine may still be writing the model, and answers for that itself.
                return Ending(0, was_stopped=stop.was_asked)
            _wait_for_ending(status_file, before)
        status = read_status(status_file) if _read_version(status_file) != before else None
        if stop.was_forced and (status is None or status.get("exit_code") is None):
            return Ending(1, f"ended at once, as asked; {words.lost}", was_stopped=True)
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


def _launch(
    command: Command, variables: Mapping[str, str], stop: _Stop, shows_everything: bool, keeps_stdout: bool
) -> int:
    try:
        process = subprocess.Popen(
            command.words,
            env=variables,
            stdin=subprocess.DEVNULL,  # A background group that reads the terminal would be halted.
            stdout=2 if keeps_stdout else None,
            stderr=None if shows_everything else subprocess.PIPE,
            start_new_session=False,
            process_group=0,
            preexec_fn=build_death_signal(),
            text=True,
            errors="replace",
        )
    except OSError as error:
        raise LaunchFailed(f"{command.words[0]} could not be started: {error}") from None
    stop.group = process.pid
    reader = None
    if process.stderr is not None:
        reader = threading.Thread(target=_pass_on, args=(process.stderr,), daemon=True)
        reader.start()
    return_code = process.wait()
    if reader is not None:
        # Orphans hold the pipe open. Those of a launcher that was killed are writing a checkpoint, and another start would
        # find them in its run directory.
        reader.join(timeout=_SECONDS_FOR_ORPHANS if return_code < 0 and not stop.was_forced else 5)
    return return_code


def build_death_signal() -> Callable[[], None] | None:
    """For `preexec_fn`: a new process gets SIGTERM when this one dies, which it would not notice in a group of its own."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl  # Looked up here: between fork and exec little is allowed.
    return lambda: prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))


def _pass_on(stream: IO[str]) -> None:
    with stream:
        for line in drop_agent_noise(stream):
            sys.stderr.write(line)
            sys.stderr.flush()


def drop_agent_noise(lines: Iterable[str]) -> Iterator[str]:
    """Leave out what torch's elastic agent and accelerate print about a process that has already said why it failed.

    Dropped are the agent's log lines, and a traceback that ends in ChildFailedError (with the banner behind it), in
    CalledProcessError, or in the agent's own SignalException. Every other traceback comes through whole.
    """
    held: list[str] = []
    in_banner = False
    for line in lines:
        if in_banner:
            # The banner stands between two lines of "=", with lines of "-" and indented text inside.
            if line.startswith("=====") and len(held) > 1:
                held, in_banner = [], False
            else:
                held.append(line)
            continue
        if held:
            held.append(line)
            if line[:1].isspace():
                continue
            if "ChildFailedError" in line:
                held, in_banner = [line], True
            elif "CalledProcessError" in line or "elastic.multiprocessing.api.SignalException" in line:
                held = []
            else:
                yield from held
                held = []
        elif line.startswith("Traceback (most recent call last)"):
            held = [line]
        elif not _AGENT_LOG.match(line):
            yield line
    if not in_banner:
        yield from held


class _Stop:
    """Turns signals into a STOP file: the first asks for a checkpoint, the second ends the processes, the third kills."""

    def __init__(self, path: Path, words: StopWords) -> None:
        self.path = path
        self.words = words
        self.group: int | None = None
        self._count = 0
        self._last = -math.inf

    @property
    def was_asked(self) -> bool:
        return self._count > 0 or self.path.exists()  # A batch shell may ask as well.

    @property
    def was_forced(self) -> bool:
        return self._count > 1

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
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


def read_status(path: Path) -> dict[str, Any] | None:
    """A status file's content; None where there is none, or none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def judge(return_code: int, status: Mapping[str, Any] | None, was_stopped: bool = False) -> Ending:
    """What became of a training, from the launcher's return code and the status that the training left."""
    ended = f"signal {-return_code}" if return_code < 0 else f"exit code {return_code}"
    if status is None:
        if return_code == 0:
            return Ending(0, was_stopped=was_stopped)
        message = (
            f"accelerate launch ended with {ended} before the training could say why; --debug shows all of its output"
        )
        return Ending(1, message, was_stopped)
    step, code = status.get("step", 0), status.get("exit_code")
    if code is None:
        message = f"a process was killed or died at step {step}, after which accelerate launch ended with {ended}"
        return Ending(1, message, was_stopped)
    if code == 0 and return_code != 0:
        return Ending(1, f"the training finished, but accelerate launch ended with {ended}", was_stopped)
    cause = str(status.get("message", ""))
    message = f"failed at step {step}: {cause}" if code == 1 else ""
    was_orphaned = return_code < 0 and code == 75 and not was_stopped
    return Ending(int(code), message, was_stopped, was_orphaned, cause)


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
