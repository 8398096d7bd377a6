"""The command line in a process of its own: its output passed on as it comes, its errors as exceptions."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

# By its path: the child runs the code that the caller has imported, whatever else its working directory holds.
_PROGRAM = str(Path(__file__).with_name("__main__.py"))

# Jupyter sets these for its kernels. What prints into a file would send a terminal's control characters.
_TERMINAL_VARIABLES = ("FORCE_COLOR", "CLICOLOR_FORCE")

_SECONDS_BETWEEN_LOOKS = 0.1


def run_command(words: Sequence[str], shows_output: bool = True) -> dict[str, Any]:
    """Run `onecurve WORDS --json` to its end.

    Each KeyboardInterrupt is passed on, as Ctrl-C in a terminal: the first asks a training for a checkpoint and a stop, the
    second ends its processes. If this process dies, the training gets the first.

    Args:
        shows_output: write what it prints for people to sys.stdout; else only after a crash.

    Returns:
        The object that it printed on stdout.

    Raises:
        LauncherError, RecipeError, Fault: what the command line reports as a message.
        KeyboardInterrupt: interrupted before there was anything to stop.
    """
    from onecurve.launcher.launching.process import build_death_signal

    environment = {name: value for name, value in os.environ.items() if name not in _TERMINAL_VARIABLES}
    # Files, and not pipes: if this process dies, a training that writes its last checkpoint can still print.
    with tempfile.TemporaryFile() as answer, tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [sys.executable, _PROGRAM, *words, "--json"],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=answer,
            stderr=output,
            process_group=0,  # A terminal or Jupyter would interrupt it as well, and two requests end it at once.
            preexec_fn=build_death_signal(),
        )
        try:
            _follow(process, output, shows_output)
        finally:
            if process.poll() is None:  # sys.stdout can't be written to.
                process.terminate()
                process.wait()
        content = _parse(_read(answer, 0))
        if process.returncode == 0 and content is not None:
            return content
        if process.returncode == 1 and not shows_output:
            sys.stderr.write(_read(output, 0).decode(errors="replace"))
        raise build_error(process.returncode, content)


def _follow(process: subprocess.Popen[bytes], output: IO[bytes], shows_output: bool) -> None:
    """Write whole lines to sys.stdout as they come, until the process has ended."""
    position, is_over = 0, False
    while not is_over:
        try:
            is_over = process.poll() is not None
            text = _read(output, position)
            end = len(text) if is_over else text.rfind(b"\n") + 1
            if shows_output and end:
                sys.stdout.write(text[:end].decode(errors="replace"))
                sys.stdout.flush()
            position += end
            if not is_over:
                time.sleep(_SECONDS_BETWEEN_LOOKS)
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
            is_over = False


def _read(file: IO[bytes], position: int) -> bytes:
    """From a position to the end, without moving the place where the child writes."""
    return os.pread(file.fileno(), os.fstat(file.fileno()).st_size - position, position)


def _parse(text: bytes) -> dict[str, Any] | None:
    try:
        content = json.loads(text)
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def build_error(exit_code: int, answer: dict[str, Any] | None) -> BaseException:
    """The exception for a command that failed.

    Args:
        answer: what it printed as JSON; None if it did not get so far.
    """
    from onecurve.launcher import errors
    from onecurve.training.config import RecipeError
    from onecurve.training.errors import BadInput, Diverged, Fault, Preempted

    if answer is None:
        if exit_code in (130, -signal.SIGINT):
            return KeyboardInterrupt()
        ended = f"signal {-exit_code}" if exit_code < 0 else f"exit code {exit_code}"
        return errors.LaunchFailed(f"the launcher ended with {ended} and no answer; what it printed may say why")
    message, kind = str(answer.get("message", "")), answer.get("error")
    if kind is None:  # The training had started.
        return {2: BadInput, 3: Diverged, 75: Preempted}.get(exit_code, Fault)(message)
    if kind == "PreflightFailed":
        return errors.PreflightFailed(answer["problems"])
    if kind == "RecipeError":  # A file that has changed since this process read it.
        return RecipeError("the recipe", answer["problems"])
    found = vars(errors).get(kind, errors.LauncherError)
    return found(message) if issubclass(found, errors.LauncherError) else errors.LauncherError(message)
