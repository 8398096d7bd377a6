"""`onecurve merge RUN`: put a run's adapter into its model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from onecurve.launcher.cli.options import DebugOption, RunArgument


def merge(
    run: RunArgument,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FOLDER", help="a new folder; by default RUN/merged")
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", help="also where the model was quantized, which loses something")
    ] = False,
    debug: DebugOption = False,
) -> int:
    """Put a run's adapter into its model, prove that it gives the same outputs, and write the whole model."""
    from onecurve.launcher.facts.history import check_finished
    from onecurve.launcher.launching.command import find_root
    from onecurve.launcher.launching.merge import merge_adapter

    check_finished(run)
    return merge_adapter(run, output or run / "merged", find_root(), yes)
