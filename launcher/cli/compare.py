"""`onecurve compare RUN RUN...`: settings that differ, metrics and cost of several runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from onecurve.launcher.cli.options import DebugOption, JsonOption
from onecurve.launcher.errors import UsageError


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN...", help="run directories")],
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> int:
    """Compare runs: settings that differ, metrics, cost."""
    from onecurve.launcher.facts.history import load_history
    from onecurve.launcher.views.compare import build_comparison, print_comparison

    if len(runs) < 2:
        raise UsageError("compare: give two run directories or more")
    comparison = build_comparison([load_history(run) for run in runs])
    if as_json:
        print(json.dumps(comparison, indent=2))
    else:
        from rich.console import Console

        print_comparison(Console(), comparison)
    return 0
