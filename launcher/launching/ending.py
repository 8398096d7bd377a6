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
        exit_code: the training's own, or 1 where it could not say.
        message: one line for the user; empty where the training has said it already.
        was_stopped: a signal asked for the end.
        was_orphaned: accelerate launch was killed, and nothing else made the training stop.
    """

    exit_code: int
    message: str = ""
    was_stopped: bool = False
    was_orphaned: bool = False


def read_status(path: Path) -> dict[str, Any] | None:
    """A status file's content; None where there is none, or none that can be read."""
    return read_json(path) or None


def judge(return_code: int, status: Mapping[str, Any] | None, was_stopped: bool = False) -> Ending:
    """What became of a training, from the launcher's return code and the status that the training left."""
    ended = f"signal {-return_code}" if return_code < 0 else f"exit code {return_code}"
    if status is None:
        if return_code == 0:
            return Ending(FINISHED, was_stopped=was_stopped)
        message = (
            f"accelerate launch ended with {ended} before the training could say why; --debug shows all of its output"
        )
        return Ending(FAILED, message, was_stopped)
    step, code = status.get("step", 0), status.get("exit_code")
    if code is None:
        message = f"a process was killed or died at step {step}, after which accelerate launch ended with {ended}"
        return Ending(FAILED, message, was_stopped)
    if code == FINISHED and return_code != 0:
        return Ending(FAILED, f"the training finished, but accelerate launch ended with {ended}", was_stopped)
    message = f"failed at step {step}: {status.get('message', '')}" if code == FAILED else ""
    return Ending(
        int(code), message, was_stopped, was_orphaned=return_code < 0 and code == PREEMPTED and not was_stopped
    )
