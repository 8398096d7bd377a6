"""Slurm's own commands, run from here."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence

from onecurve.launcher.errors import LaunchFailed, Unsuitable

_SECONDS_TO_ANSWER = 60


def run_slurm(words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's commands.

    Raises:
        Unsuitable: there is no Slurm here.
        LaunchFailed: it does not answer.
    """
    # A person's defaults for squeue would change what is read here.
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
        raise Unsuitable(f"{words[0]} is not here: run this on a login node of a Slurm cluster") from None
    except subprocess.TimeoutExpired:
        raise LaunchFailed(f"Slurm's {words[0]} has not answered for {_SECONDS_TO_ANSWER} s; try again later") from None
