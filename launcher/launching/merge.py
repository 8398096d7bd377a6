"""`onecurve merge`: runs training/merge.py in a process of its own, because the launcher must not import what that needs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def merge_adapter(run: Path, output: Path, root: Path, is_confirmed: bool = False) -> int:
    """Write the model that a run's adapter makes; returns the exit code: 0, 1 if it is another model, 2 if there is none.

    Args:
        is_confirmed: whether that is wanted of a quantized model too.
    """
    words = [f"--run={run}", f"--output={output}", *(["--yes=true"] if is_confirmed else [])]
    return subprocess.run([sys.executable, str(root / "training" / "merge.py"), *words], check=False).returncode
