"""`onecurve run RECIPE [--key value ...]`: choose a topology, check, start the training and supervise it."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import typer

from onecurve.launcher.cli.options import LaunchOptions, RecipeArgument, allow, parse_keys, takes
from onecurve.launcher.errors import PreflightFailed

if TYPE_CHECKING:
    from onecurve.launcher.launching.command import Command
    from onecurve.launcher.launching.ending import Ending
    from onecurve.launcher.planning.topology import Topology
    from onecurve.launcher.preflight.findings import Finding
    from onecurve.training.config import Recipe


@dataclass(frozen=True, kw_only=True)
class RunOptions(LaunchOptions):
    """The command line of `onecurve run`."""

    context: typer.Context
    recipe: RecipeArgument


@takes(RunOptions)
def run(options: RunOptions) -> int:
    """Train a recipe on the topology that suits this machine.

    Chooses, checks, starts the training and supervises it; --key value overrides a recipe's key. Returns the training's
    exit code: 0 finished, 2 bad input, 3 diverged, 75 stopped with a checkpoint, 1 anything else. Ctrl-C, SIGTERM
    and SIGUSR1 ask for a checkpoint and a stop.
    """
    return launch_training(str(options.recipe), parse_keys(options.context), options)


@dataclass(frozen=True)
class Launch:
    """A training that is ready to start.

    Attributes:
        again: the command of a restart, which continues the run of the first start.
        facts: what was chosen, and why.
    """

    recipe: Recipe
    topology: Topology
    command: Command
    again: Command
    facts: Sequence[str]
    findings: Sequence[Finding]

    @property
    def errors(self) -> list[str]:
        """Messages of the findings with which nothing can be started."""
        return [finding.message for finding in self.findings if finding.severity == "error"]


def launch_training(recipe_path: str, overrides: Mapping[str, str], options: LaunchOptions) -> int:
    """Choose a topology, check everything, then train; returns the training's exit code.

    Raises:
        RecipeError: the recipe is wrong.
        PreflightFailed: something else is.
        UnknownTopology, Unsuitable: there is no such topology, or this machine can't run it.
    """
    launch = prepare_launch(recipe_path, overrides, options)
    if options.as_json and options.dry_run:
        print(json.dumps(describe_launch(launch.command, launch.topology, launch.findings), indent=2))
        return PreflightFailed.exit_code if launch.errors else 0
    _print_launch(launch, options.dry_run)
    if launch.errors:
        raise PreflightFailed(launch.errors)
    if options.dry_run:
        return 0
    ending = supervise_launch(launch, options)
    if ending.message:
        print(f"onecurve: {ending.message}", file=sys.stderr)
    if options.as_json:
        message = ending.message or ending.cause
        print(json.dumps({"exit_code": ending.exit_code, "run": launch.recipe.output_dir, "message": message}))
    return ending.exit_code


def prepare_launch(recipe_path: str, overrides: Mapping[str, str], options: LaunchOptions) -> Launch:
    """Choose a topology and check everything. Raises as `launch_training`, but for PreflightFailed."""
    from onecurve.launcher.facts.machine import detect_machine
    from onecurve.launcher.facts.recipes import load_recipe
    from onecurve.launcher.launching.command import build_command, find_root, to_arguments
    from onecurve.launcher.planning.choice import pick_topology
    from onecurve.launcher.preflight import check_recipe
    from onecurve.launcher.preflight.precision import check_bf16_speed

    overrides = allow(overrides, options.yes)
    root, machine = find_root(), detect_machine()
    resolved = load_recipe(recipe_path, overrides)
    recipe = resolved.recipe
    topology = pick_topology(root, machine, recipe, options.topology, options.num_processes)

    def build(overrides: Mapping[str, str]) -> Command:
        words = ["--config", recipe_path, *to_arguments(overrides)]
        return build_command(machine, topology, root / "training" / "run.py", words)

    command = build(overrides)
    facts, findings = check_bf16_speed(recipe, topology)
    findings += check_recipe(recipe, topology, machine, resolved.eval_only)
    # A restart continues the run of the first start, which `never` would refuse.
    again = build({**overrides, "resume": "auto"}) if recipe.resume == "never" else command
    return Launch(recipe, topology, command, again, [*topology.reasons, *facts], findings)


def supervise_launch(launch: Launch, options: LaunchOptions) -> Ending:
    """Train, and start again after a crash as often as --max-restarts allows.

    On one machine also where a device of several had too little memory: machines would have to agree on that.
    """
    from onecurve.launcher.launching.supervise import supervise, supervise_with_restarts
    from onecurve.launcher.views.terminal import print_note
    from onecurve.training.launch_protocol import RESTARTS_LEFT
    from onecurve.training.run_directory import RunDirectory

    run = RunDirectory.of(launch.recipe)

    def start(num_starts: int, restarts_left: int) -> Ending:
        command = launch.again if num_starts else launch.command
        # `onecurve watch` reads in the run's status whether another start will follow a failure.
        command = replace(command, environment={**command.environment, RESTARTS_LEFT: str(restarts_left)})
        before = run.read_memory()
        ending = supervise(command, run.path, options.debug, keeps_stdout=options.as_json)
        # A process alone goes on in smaller micro-batches by itself.
        waits_for_others = command.num_processes > 1 and launch.topology.num_machines == 1
        return replace(ending, has_shrunk=waits_for_others and run.read_memory() != before)

    return supervise_with_restarts(start, options.max_restarts, print_note)


def _print_launch(launch: Launch, is_dry_run: bool) -> None:
    from onecurve.launcher.views.terminal import print_note, wrap_fact

    for line in launch.facts:
        print_note(wrap_fact(line))
    (print if is_dry_run else print_note)(launch.command.to_shell())
    for finding in launch.findings:
        if finding.severity == "warning":
            print_note(f"warning: {finding.message}")


def describe_launch(command: Command, topology: Topology, findings: Sequence[Finding]) -> dict[str, Any]:
    """What --dry-run --json prints."""
    return {
        "topology": topology.name,
        "strategy": topology.strategy,
        "num_processes": topology.num_processes,
        "num_machines": topology.num_machines,
        "reasons": list(topology.reasons),
        "command": list(command.words),
        "environment": dict(command.environment),
        "findings": [asdict(finding) for finding in findings],
    }
