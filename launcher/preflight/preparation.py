"""`onecurve check --deep`: runs the training's own preparation of data and model, in a process of its own.

It finds exactly what a training would find: wrong labels in any row, a tokenizer or weights that do not load. The
prepared data stays in the cache for the training.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from onecurve.launcher.preflight.findings import Finding, error
from onecurve.training.launch_protocol import EXAMPLE_LINE, STATUS_FILE

Example = list[tuple[str, bool]]


def check_preparation(
    recipe: str, overrides: Mapping[str, str], root: Path
) -> tuple[list[str], list[Finding], Example | None]:
    """Prepare everything that a training needs before its first step.

    Returns:
        Facts; the problem that stopped the preparation, if there was one; the tokens of an example, and which of them are
        targets, if the task's targets are tokens.
    """
    words = ["--config", recipe, *(f"--{key}={value}" for key, value in overrides.items())]
    with tempfile.TemporaryDirectory(prefix="onecurve-") as folder:
        status = Path(folder) / "status.json"
        variables = {**os.environ, STATUS_FILE: str(status)}
        result = subprocess.run(
            [sys.executable, str(root / "training" / "check.py"), *words],
            env=variables,
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode == 0:
            lines = result.stdout.splitlines()
            examples = [line.removeprefix(EXAMPLE_LINE) for line in lines if line.startswith(EXAMPLE_LINE)]
            facts = [line for line in lines if not line.startswith(EXAMPLE_LINE)]
            return facts, [], [(text, is_target) for text, is_target in json.loads(examples[0])] if examples else None
        try:
            message = json.loads(status.read_text(encoding="utf-8"))["message"]
        except (OSError, ValueError, KeyError):
            message = (
                result.stderr.strip().rpartition("\n")[2]
                or f"training/check.py ended with exit code {result.returncode}"
            )
    return result.stdout.splitlines(), [error(message)], None
