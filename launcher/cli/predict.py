"""`onecurve predict RUN --input FILE --output FILE`: predict with a run's final model, or with one of its checkpoints."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from onecurve.launcher.cli.options import (
    DebugOption,
    DryRunOption,
    JsonOption,
    ProcessesOption,
    RunArgument,
    TopologyOption,
    takes,
)
from onecurve.launcher.cli.run import describe_launch
from onecurve.launcher.errors import UsageError

if TYPE_CHECKING:
    from onecurve.launcher.facts.machine import Machine


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """The command line of `onecurve predict`."""

    run: RunArgument
    input_file: Annotated[
        Path,
        typer.Option("--input", metavar="FILE", help="CSV, TSV, JSON Lines, Parquet or CoNLL; or a folder of images"),
    ]
    output_file: Annotated[Path, typer.Option("--output", metavar="FILE", help="CSV, TSV, JSON Lines or Parquet")]
    num_processes: ProcessesOption = None
    batch_size: Annotated[
        int | None,
        typer.Option("--batch_size", "--batch-size", min=1, help="by default the run's per_device_batch_size"),
    ] = None
    checkpoint: Annotated[
        str | None,
        typer.Option("--checkpoint", metavar="NAME", help="best, or a checkpoint's name or step; by default final"),
    ] = None
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an output that exists")] = False
    topology: TopologyOption = None
    dry_run: DryRunOption = False
    as_json: JsonOption = False
    debug: DebugOption = False


@takes(PredictOptions)
def predict(options: PredictOptions) -> int:
    """Predict with a run's final model, or with another checkpoint, for each row of a file.

    The output has the same rows in the same order, with predictions added; the file may have any size. A folder of images
    gives a row for each, by name: its path, and its class where the folder has a folder for each.
    """
    from onecurve.launcher.facts.machine import detect_machine
    from onecurve.launcher.launching.command import build_command, find_root, to_arguments
    from onecurve.launcher.launching.stop import PREDICTION
    from onecurve.launcher.launching.supervise import supervise
    from onecurve.launcher.planning.topology import build_topology
    from onecurve.launcher.views.terminal import print_note

    _check_files(options)
    root, machine = find_root(), detect_machine()
    name = options.topology or _pick_topology(machine, options.num_processes)
    topology = build_topology(root, machine, name, options.num_processes)
    words = {"run": str(options.run), "input": str(options.input_file), "output": str(options.output_file)}
    if options.batch_size is not None:
        words["batch_size"] = str(options.batch_size)
    if options.checkpoint is not None:
        words["checkpoint"] = options.checkpoint
    if options.overwrite:
        words["overwrite"] = "true"
    command = build_command(machine, topology, root / "training" / "predict.py", to_arguments(words))
    if options.as_json and options.dry_run:
        print(json.dumps(describe_launch(command, topology, ()), indent=2))
        return 0
    (print if options.dry_run else print_note)(command.to_shell())
    if options.dry_run:
        return 0
    ending = supervise(command, None, options.debug, PREDICTION, keeps_stdout=options.as_json)
    if ending.message:
        print(f"onecurve: {ending.message}", file=sys.stderr)
    if options.as_json:
        message = ending.message or ending.cause
        print(json.dumps({"exit_code": ending.exit_code, "output": str(options.output_file), "message": message}))
    return ending.exit_code


def _check_files(options: PredictOptions) -> None:
    """Refuse files that prediction can't read or write.

    Raises:
        NotARun: no training has written to the run directory.
        UsageError: it holds no such model, a file is missing or of an unknown format, or the output exists.
    """
    from onecurve.launcher.facts.history import check_run
    from onecurve.training.data.predicted_rows import find_path_problem

    run = check_run(options.run)
    if run.find_model(options.checkpoint) is None:
        raise UsageError(run.describe_missing_model(options.checkpoint))
    if problem := find_path_problem(options.input_file, options.output_file, options.overwrite):
        raise UsageError(problem)


def _pick_topology(machine: Machine, num_processes: int | None) -> str:
    """Without sharding: each process holds the whole model."""
    if machine.kind == "cpu":
        return "multi_cpu" if (num_processes or 1) > 1 else "cpu"
    return "multi_gpu" if len(machine.devices) > 1 else "single_gpu"
