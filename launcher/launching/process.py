"""Starts a command in a process group of its own, filters its stderr and waits for its end."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from typing import IO

from onecurve.launcher.errors import LaunchFailed
from onecurve.launcher.launching.agent_output import drop_agent_noise
from onecurve.launcher.launching.command import Command
from onecurve.launcher.launching.stop import Stop

# If accelerate launch is killed, its processes notice after a step, write a checkpoint and end within this time.
_SECONDS_FOR_ORPHANS = 120.0

_PR_SET_PDEATHSIG = 1


def run_to_end(
    command: Command, variables: Mapping[str, str], stop: Stop, shows_everything: bool, keeps_stdout: bool
) -> int:
    """Start the command and wait for its end; returns its return code, negative for a signal.

    Args:
        stop: its `group` is set to the process group, which a second signal ends.
        shows_everything: pass all of its stderr on, with what the launching tools print about a failure.
        keeps_stdout: leave stdout to the caller; what the command prints there goes to stderr.

    Raises:
        LaunchFailed: it can't be started.
    """
    try:
        process = subprocess.Popen(
            command.words,
            env=variables,
            stdin=subprocess.DEVNULL,  # A background process group that reads the terminal is suspended.
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
        # Processes that outlive accelerate launch hold the pipe open. If it was killed, they are writing a checkpoint; another
        # start must wait for them, because it uses the same run directory.
        reader.join(timeout=_SECONDS_FOR_ORPHANS if return_code < 0 and not stop.was_forced else 5)
    return return_code


def build_death_signal() -> Callable[[], None] | None:
    """A function that makes the system send SIGTERM to a new process when this one is killed; else it would run on."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl  # Looked up before the fork: few calls are safe between fork and exec.
    return lambda: prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))


def _pass_on(stream: IO[str]) -> None:
    with stream:
        for line in drop_agent_noise(stream):
            sys.stderr.write(line)
            sys.stderr.flush()
