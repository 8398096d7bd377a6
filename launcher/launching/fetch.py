"""`onecurve fetch`: runs training/fetch.py in a process of its own, because the launcher must not import what that needs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path


def fetch_inputs(recipe: str, overrides: Mapping[str, str], root: Path) -> int:
    """Download what the recipe names into the caches; returns the exit code: 0, or 2 if something is not available."""
    words = ["--config", recipe, *(f"--{key}={value}" for key, value in overrides.items())]
    # `fetch` needs the network, also where the jobs are set to work offline.
    variables = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0"}
    return subprocess.run(
        [sys.executable, str(root / "training" / "fetch.py"), *words], env=variables, check=False
    ).returncode
