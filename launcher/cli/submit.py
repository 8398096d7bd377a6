"""`onecurve submit RECIPE`: check everything on the login node, then submit to Slurm; or write another platform's job file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

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
from onecurve.launcher.errors import UsageError

if TYPE_CHECKING:
    from onecurve.launcher.cli.sweep import SweepOptions
    from onecurve.launcher.cluster.request import Request


@dataclass(frozen=True, kw_only=True)
class SubmitOptions(ResourceOptions):
    """The command line of `onecurve submit`."""

    context: typer.Context
    recipe: RecipeArgument
    to: Annotated[
        Literal["slurm", "skypilot", "kubernetes"],
        typer.Option(
            "--to", help="slurm, or skypilot or kubernetes: write a job file for it and print what submits it"
        ),
    ] = "slurm"
    volume: Annotated[
        str | None,
        typer.Option(
            "--volume", help="with --to: the volume that all nodes see; runs (Kubernetes: all files) lie on it"
        ),
    ] = None
    mount: Annotated[
        str | None, typer.Option("--mount", help="with --to: where nodes find the volume; by default /onecurve")
    ] = None
    gpu: Annotated[str | None, typer.Option("--gpu", help="with --to skypilot: the kind of GPU, such as H100")] = None
    image: Annotated[str | None, typer.Option("--image", help="with --to: a container's image that holds onecurve")] = (
        None
    )
    output: Annotated[
        Path | None, typer.Option("--output", help="with --to: the file; by default JOB-PLATFORM.yaml")
    ] = None
    topology: TopologyOption = None
    num_processes: ProcessesOption = None
    dry_run: Annotated[
        bool, typer.Option("--dry-run", "--dry_run", help="check and print the commands, or the file; do nothing")
    ] = False
    as_json: JsonOption = False
    debug: DebugOption = False


@takes(SubmitOptions)
def submit(options: SubmitOptions) -> int:
    """Check everything, then submit the training to Slurm. `onecurve sweep --slurm` submits many.

    With --to skypilot or --to kubernetes it writes a job file instead, and prints the command that submits it.
    """
    if options.to != "slurm":
        return _write_job(options, options.to)
    others = {name: getattr(options, name) for name in ("volume", "mount", "gpu", "image", "output")}
    if given := [f"--{name}" for name, value in others.items() if value is not None]:
        raise UsageError(f"{', '.join(given)}: Slurm needs none; add --to skypilot or --to kubernetes, or leave it out")
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
    from onecurve.launcher.cluster.submit import submit_request
    from onecurve.launcher.launching.command import find_root
    from onecurve.launcher.views.terminal import print_note

    request = _build_request(recipe, overrides, options, sweep, at_once)
    submitted = submit_request(find_root(), request, options.dry_run, print_note)
    if options.as_json:
        print(json.dumps(asdict(submitted), indent=2))
    elif options.dry_run:
        print("\n".join(submitted.commands))
    else:
        print(f"{submitted.job_id}  then: onecurve watch {submitted.runs[0]}, onecurve cancel {submitted.job_id}")
    return 0


def _build_request(
    recipe: str,
    overrides: Mapping[str, str],
    options: SubmitOptions | SweepOptions,
    sweep: Path | None = None,
    at_once: int | None = None,
) -> Request:
    from onecurve.launcher.cluster.request import Request

    return Request(
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


def _write_job(options: SubmitOptions, platform: Literal["skypilot", "kubernetes"]) -> int:
    from onecurve.launcher.cluster.elsewhere import DEFAULT_MOUNT, Place
    from onecurve.launcher.cluster.job_file import write_job_file
    from onecurve.launcher.launching.command import find_root
    from onecurve.launcher.views.terminal import print_note

    if options.volume is None:
        raise UsageError(f"--to {platform} needs --volume: a disk that outlives the job's machines, for checkpoints")
    mount = (options.mount or DEFAULT_MOUNT).rstrip("/")
    place = Place(volume=options.volume, mount=mount, gpu=options.gpu, image=options.image)
    request = _build_request(str(options.recipe), parse_keys(options.context), options)
    written = write_job_file(find_root(), platform, request, place, options.output, options.dry_run, print_note)
    if options.as_json:
        print(json.dumps(asdict(written), indent=2))
    elif options.dry_run:
        print(written.text, end="")
    else:
        print(written.command)
    return 0
