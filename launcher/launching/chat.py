"""`onecurve chat`: runs training/chat.py in a process of its own, because the launcher must not import what that needs."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path


def talk(run: Path, max_new_tokens: int | None, root: Path) -> int:
    """Let a run's final model answer what is typed; returns the exit code."""
    words = [f"--run={run}"] + ([] if max_new_tokens is None else ["--max_new_tokens", str(max_new_tokens)])
    with subprocess.Popen([sys.executable, str(root / "training" / "chat.py"), *words]) as process:
        while True:
            with contextlib.suppress(KeyboardInterrupt):  # The terminal sends Ctrl-C to both: it stops an answer there.
                return process.wait()
