"""`onecurve cancel JOB` or `RUN`: cancel a Slurm job."""

from __future__ import annotations

from typing import Annotated

import typer

from onecurve.launcher.cli.options import DebugOption


def cancel(
    job: Annotated[str, typer.Argument(metavar="JOB|RUN", help="a job's number, or its run directory")],
    debug: DebugOption = False,
) -> int:
    """Cancel a Slurm job. Its training writes a checkpoint if Slurm gives it enough time."""
    from onecurve.launcher.cluster.queue import cancel_job
    from onecurve.launcher.views.terminal import print_note

    print_note(f"job {cancel_job(job)} is canceled; submit it again to continue from its last checkpoint")
    return 0
