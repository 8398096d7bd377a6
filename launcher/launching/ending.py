"""How a training ended, from the launcher's return code and the status file that the training wrote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onecurve.launcher.facts.history import read_json
from onecurve.training.launch_protocol import FAILED, FINISHED, PREEMPTED


@dataclass(frozen=True)
class Ending:
    """How a training ended.

    Attributes:
        exit_code: the training's own, or 1 if it wrote none.
        message: one line for the user; empty if the training has printed its own.
        was_stopped: a signal or a STOP file asked for the end.
        was_orphaned: the training stopped only because accelerate launch was killed.
        cause: the training's own message about its end; empty if it finished, or could not write one.
        has_shrunk: a device had too little memory, and the next start will have smaller micro-batches.
    """

    exit_code: int
    message: str = ""
    was_stopped: bool = False
    was_orphaned: bool = False
    cause: str = ""
    has_shrunk: bool = False


def read_status(path: Path) -> dict[str, Any] | None:
    """A status file's content; None if there is none, or it can't be read."""
    return read_json(path) or None


def judge(return_code: int, status: Mapping[str, Any] | None, was_stopped: bool = False) -> Ending:
    """How a training ended, from the return code of accelerate launch and the status that the training wrote."""
    ended = f"signal {-return_code}" if return_code < 0 else f"exit code {return_code}"
    if status is None:
        if return_code == 0:
            return Ending(FINISHED, was_stopped=was_stopped)
        message = f"accelerate launch ended with {ended} before the training wrote its status; --debug shows all output"
        return Ending(FAILED, message, was_stopped)
    step, code = status.get("step", 0), status.get("exit_code")
    if code is None:
        message = f"a process died or was killed at step {step}; accelerate launch ended with {ended}"
        return Ending(FAILED, message, was_stopped)
    if code == FINISHED and return_code != 0:
        return Ending(FAILED, f"the training finished, but accelerate launch ended with {ended}", was_stopped)
    cause = str(status.get("message", ""))
    message = f"failed at step {step}: {cause}" if code == FAILED else ""
    was_orphaned = return_code < 0 and code == PREEMPTED and not was_stopped
    return Ending(int(code), message, was_stopped, was_orphaned, cause)
