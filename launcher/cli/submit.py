"""`onecurve submit RECIPE`: check everything on the login node, then submit the training to Slurm."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from onecurve.launcher.cli.options import (
    DebugOption,
    JsonOption,
    ProcessesOption,
    RecipeArgument,
    TopologyOption,
    parse_keys,
    takes,
)


@dataclass(frozen=True, kw_only=True)
class SubmitOptions:
    """The command line of `onecurve submit`."""

    context: typer.Context
    recipe: RecipeArgument
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="machines")] = 1
    gpus_per_node: Annotated[int, typer.Option("--gpus-per-node", "--gpus_per_node", min=0, help="GPUs on each")] = 0
    cpus_per_node: Annotated[
        int | None,
        typer.Option("--cpus-per-node", "--cpus_per_node", min=1, help="cores on each; by default 4 per GPU, or 4"),
    ] = None
    time: Annotated[str | None, typer.Option("--time", help="limit of each start, such as 12:00:00")] = None
    partition: Annotated[str | None, typer.Option("--partition", help="a partition that sinfo lists")] = None
    job_name: Annotated[str | None, typer.Option("--job-name", "--job_name", help="by default onecurve")] = None
    array: Annotated[
        Path | None, typer.Option("--array", metavar="SWEEP", help="a sweep file: one task of a job array per run")
    ] = None
    at_once: Annotated[
        int | None, typer.Option("--at-once", "--at_once", min=1, help="most tasks of the array at a time")
    ] = None
    dependency: Annotated[str | None, typer.Option("--dependency", help="such as afterok:123")] = None
    sbatch: Annotated[
        list[str] | None,
        typer.Option("--sbatch", metavar="OPTION", help="any other option of sbatch, such as --sbatch=--account=NAME"),
    ] = None
    topology: TopologyOption = None
    num_processes: ProcessesOption = None
    dry_run: Annotated[
        bool, typer.Option("--dry-run", "--dry_run", help="check and print the commands, submit nothing")
    ] = False
    as_json: JsonOption = False
    debug: DebugOption = False


@takes(SubmitOptions)
def submit(options: SubmitOptions) -> int:
    """Check everything, then submit the training to Slurm; with --array one run per setting, and their comparison."""
    # As in a job, everything must be on this machine already. The hub's client reads this variable when it is imported.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from onecurve.launcher.cluster.request import Request
    from onecurve.launcher.cluster.submit import submit_request
    from onecurve.launcher.launching.command import find_root
    from onecurve.launcher.views.terminal import print_note

    request = Request(
        recipe=str(options.recipe),
        overrides=parse_keys(options.context),
        num_nodes=options.nodes,
        gpus_per_node=options.gpus_per_node,
        cpus_per_node=options.cpus_per_node,
        time=options.time,
        partition=options.partition,
        job_name=options.job_name,
        dependency=options.dependency,
        options=tuple(options.sbatch or ()),
        sweep=options.array,
        at_once=options.at_once,
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
