"""Runs Slurm's commands."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence

from onecurve.launcher.errors import LaunchFailed, Unsuitable

_SECONDS_TO_ANSWER = 60


def run_slurm(words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's commands.

    Raises:
        Unsuitable: the command is not on this machine.
        LaunchFailed: the command does not answer.
    """
    # A user's defaults for squeue would change the output that is parsed.
    variables = {key: value for key, value in os.environ.items() if not key.startswith("SQUEUE_")}
    try:
        return subprocess.run(
            words,
            env=variables,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS_TO_ANSWER,
            check=False,
        )
    except FileNotFoundError:
        raise Unsuitable(f"{words[0]} is not installed: run this on a login node of a Slurm cluster") from None
    except subprocess.TimeoutExpired:
        raise LaunchFailed(
            f"Slurm's {words[0]} did not answer within {_SECONDS_TO_ANSWER} s; try again later"
        ) from None
