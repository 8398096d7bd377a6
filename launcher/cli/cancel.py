"""`onecurve cancel JOB` or `RUN`: end a Slurm job."""

from __future__ import annotations

from typing import Annotated

import typer

from onecurve.launcher.cli.options import DebugOption


def cancel(
    job: Annotated[str, typer.Argument(metavar="JOB|RUN", help="a job's number, or its run directory")],
    debug: DebugOption = False,
) -> int:
    """End a Slurm job and do not queue it again. Its training writes a checkpoint if Slurm gives it the time."""
    from onecurve.launcher.cluster.queue import cancel_job
    from onecurve.launcher.views.terminal import print_note

    print_note(f"job {cancel_job(job)} is ended; submit it again to go on from its last checkpoint")
    return 0
