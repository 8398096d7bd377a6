"""`onecurve merge RUN`: put a run's adapter into its model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from onecurve.launcher.cli.options import DebugOption, RunArgument
from onecurve.launcher.errors import UsageError


def merge(
    run: RunArgument,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FOLDER", help="a new folder; by default RUN/merged")
    ] = None,
    debug: DebugOption = False,
) -> int:
    """Put a run's adapter into its model, prove that it gives the same outputs, and write the whole model."""
    from onecurve.launcher.facts.history import check_run
    from onecurve.launcher.launching.command import find_root
    from onecurve.launcher.launching.merge import merge_adapter

    if not check_run(run).final.is_dir():
        raise UsageError(f"{str(run)!r} has no final/: its training has not finished")
    return merge_adapter(run, output or run / "merged", find_root())
