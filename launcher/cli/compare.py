"""`onecurve compare RUN RUN...`: settings that differ, metrics and cost of several runs; with --assert, whether two agree."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from onecurve.launcher.cli.options import DebugOption, JsonOption
from onecurve.launcher.errors import UsageError

if TYPE_CHECKING:
    from onecurve.launcher.facts.history import History

CURVES_DIFFER = 1
"""The exit code of --assert; 2 is bad input."""


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN...", help="run directories")],
    tolerance: Annotated[
        float | None,
        typer.Option(
            "--assert",
            metavar="TOLERANCE",
            help="exit with 1 where the curves of two runs differ by more (1e-5 fits float32), and say why they do",
        ),
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> int:
    """Compare runs: settings that differ, metrics, cost; or why two curves differ (--assert)."""
    from onecurve.launcher.facts.history import load_history

    if len(runs) < 2:
        raise UsageError("compare: give two run directories or more")
    if tolerance is not None and (len(runs) > 2 or not math.isfinite(tolerance) or tolerance < 0):
        raise UsageError(f"compare --assert {tolerance:g}: takes two runs and a tolerance of 0 or more, such as 1e-5")
    histories = [load_history(run) for run in runs]
    content, exit_code = _compare(histories) if tolerance is None else _assert(histories, tolerance)
    if as_json:
        print(json.dumps(content, indent=2))
        return exit_code
    from rich.console import Console

    if tolerance is None:
        from onecurve.launcher.views.compare import print_comparison

        print_comparison(Console(), content)
    else:
        from onecurve.launcher.views.divergence import print_divergence

        print_divergence(Console(), content)
    return exit_code


def _compare(histories: Sequence[History]) -> tuple[dict[str, Any], int]:
    from onecurve.launcher.views.compare import build_comparison

    return build_comparison(histories), 0


def _assert(histories: Sequence[History], tolerance: float) -> tuple[dict[str, Any], int]:
    from onecurve.launcher.views.divergence import build_divergence

    content = build_divergence(histories[0], histories[1], tolerance)
    return content, 0 if content["agree"] else CURVES_DIFFER
