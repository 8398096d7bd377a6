"""A request to Slurm, as typed values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Request:
    """A training, or a sweep of trainings, to be submitted to Slurm.

    Attributes:
        overrides: keys of the recipe that the command line changes.
        cpus_per_node: cores of each node; None: 4 per GPU, or the script's number without GPUs.
        time: in one of sbatch's forms, such as 12:00:00; None: the script's.
        dependency: as sbatch takes it, such as afterok:123.
        options: any other options of sbatch, each as --name=value.
        sweep: a sweep file, whose trials become the tasks of a job array.
        at_once: most tasks of the array that run at a time.
        topology, num_processes: options of `onecurve run`; None: it chooses.
    """

    recipe: str
    overrides: Mapping[str, str] = field(default_factory=dict)
    num_nodes: int = 1
    gpus_per_node: int = 0
    cpus_per_node: int | None = None
    time: str | None = None
    partition: str | None = None
    job_name: str | None = None
    dependency: str | None = None
    options: tuple[str, ...] = ()
    sweep: Path | None = None
    at_once: int | None = None
    topology: str | None = None
    num_processes: int | None = None
