"""Where prepared data and compiled operators are kept on this machine."""

from __future__ import annotations

import os
from pathlib import Path


def find_cache() -> Path:
    """$ONECURVE_CACHE, or ~/.cache/onecurve."""
    return Path(os.environ.get("ONECURVE_CACHE") or Path.home() / ".cache" / "onecurve")
