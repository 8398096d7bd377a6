"""`onecurve report RUN [RUN...]`: write an HTML page of one run, or of several."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from onecurve.launcher.cli.options import DebugOption, JsonOption


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN [RUN...]", help="run directories")],
    output: Annotated[
        Path | None,
        typer.Option("--output", help="the page [default: RUN/report.html; of several runs ./report.html]"),
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> int:
    """Write an HTML page of a run, or of several side by side.

    Curves, confusions, calibration, hardest examples, samples, settings, starts: one file without scripts.
    """
    from onecurve.launcher.views.report import write_report

    path = write_report(runs, output)
    print(json.dumps({"report": str(path)}) if as_json else path)
    return 0
