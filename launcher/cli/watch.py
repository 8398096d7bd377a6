"""`onecurve watch RUN` or `JOB`: follow a run live."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Annotated

import typer

from onecurve.launcher.cli.options import DebugOption, JsonOption


def watch(
    run: Annotated[str, typer.Argument(metavar="RUN|JOB", help="a run directory, or the number of a job of `submit`")],
    every: Annotated[float, typer.Option("--every", min=0.2, help="seconds between updates")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="print the present state once and return")] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> int:
    """Follow a run live: curve, rate, time left, memory; of a Slurm job also its state in the queue.

    Reads the run directory only, so the run may be on another machine that shares the disk.
    """
    from rich.console import Console

    from onecurve.launcher.cluster.queue import find_job
    from onecurve.launcher.views.follow import find_run_directory, follow, wait_for_start
    from onecurve.launcher.views.progress import build_view
    from onecurve.launcher.views.watch import render

    console, folder = Console(), find_run_directory(run)
    is_single = as_json or once or not sys.stdout.isatty()
    if not wait_for_start(console, folder, 0.0 if is_single else every):
        return 0
    if as_json:
        print(json.dumps(asdict(build_view(folder, find_job))))
    elif is_single:
        console.print(render(build_view(folder, find_job), console.width))
    else:
        follow(console, folder, every)
    return 0
