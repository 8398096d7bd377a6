"""`onecurve submit RECIPE`: check everything on the login node, then submit the training to Slurm."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from onecurve.launcher.cli.options import (
    DebugOption,
    JsonOption,
    ProcessesOption,
    RecipeArgument,
    ResourceOptions,
    TopologyOption,
    parse_keys,
    takes,
)

if TYPE_CHECKING:
    from onecurve.launcher.cli.sweep import SweepOptions


@dataclass(frozen=True, kw_only=True)
class SubmitOptions(ResourceOptions):
    """The command line of `onecurve submit`."""

    context: typer.Context
    recipe: RecipeArgument
    topology: TopologyOption = None
    num_processes: ProcessesOption = None
    dry_run: Annotated[
        bool, typer.Option("--dry-run", "--dry_run", help="check and print the commands, submit nothing")
    ] = False
    as_json: JsonOption = False
    debug: DebugOption = False


@takes(SubmitOptions)
def submit(options: SubmitOptions) -> int:
    """Check everything, then submit the training to Slurm. `onecurve sweep --slurm` submits many."""
    return submit_and_print(str(options.recipe), parse_keys(options.context), options)


def submit_and_print(
    recipe: str,
    overrides: Mapping[str, str],
    options: SubmitOptions | SweepOptions,
    sweep: Path | None = None,
    at_once: int | None = None,
) -> int:
    """Submit a training, or the trials of a sweep, and print the job's number.

    Args:
        sweep: its sweep file.
        at_once: most trials that run at a time.
    """
    # As in a job, everything must be on this machine already. The hub's client reads this variable when it is imported.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from onecurve.launcher.cluster.request import Request
    from onecurve.launcher.cluster.submit import submit_request
    from onecurve.launcher.launching.command import find_root
    from onecurve.launcher.views.terminal import print_note

    request = Request(
        recipe=recipe,
        overrides=overrides,
        num_nodes=options.nodes,
        gpus_per_node=options.gpus_per_node,
        cpus_per_node=options.cpus_per_node,
        time=options.time,
        partition=options.partition,
        job_name=options.job_name,
        dependency=options.dependency,
        options=tuple(options.sbatch or ()),
        sweep=sweep,
        at_once=at_once,
        topology=options.topology,
        num_processes=options.num_processes,
    )
    submitted = submit_request(find_root(), request, options.dry_run, print_note)
    if options.as_json:
        print(json.dumps(asdict(submitted), indent=2))
    elif options.dry_run:
        print("\n".join(submitted.commands))
    else:
        print(f"{submitted.job_id}  then: onecurve watch {submitted.runs[0]}, onecurve cancel {submitted.job_id}")
    return 0
