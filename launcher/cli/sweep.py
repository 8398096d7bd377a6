"""`onecurve sweep SWEEP.yaml [--key value ...]`: train a recipe with many settings, here or on Slurm, and compare."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from onecurve.launcher.cli.options import LaunchOptions, ResourceOptions, allow, parse_keys, takes
from onecurve.launcher.errors import Unsuitable, UsageError

if TYPE_CHECKING:
    from onecurve.launcher.sweeps.sweep_file import Sweep
    from onecurve.launcher.sweeps.trials import Trial

# Of the best trials, as many as can be told apart in a table and in a chart.
_MOST_COMPARED = 4
_MOST_REPORTED = 8


@dataclass(frozen=True, kw_only=True)
class SweepOptions(LaunchOptions, ResourceOptions):
    """The command line of `onecurve sweep`."""

    context: typer.Context
    sweep: Annotated[Path, typer.Argument(metavar="SWEEP", help="a sweep file, such as slurm/sweep_example.yaml")]
    results: Annotated[
        bool, typer.Option("--results", help="show the trials that there are, also while others run; start nothing")
    ] = False
    slurm: Annotated[bool, typer.Option("--slurm", help="submit a job array to Slurm, one task per trial")] = False
    at_once: Annotated[
        int | None, typer.Option("--at-once", "--at_once", min=1, help="most tasks of the array at a time")
    ] = None


@takes(SweepOptions)
def sweep(options: SweepOptions) -> int:
    """Train a recipe with many settings, here one after the other or on Slurm, and compare the results.

    Every setting is checked before the first training starts. Stopped or killed, the same command goes on. Returns 0 if
    every trial has ended and one has finished, 2 for bad input, 75 if it was stopped, 1 if no trial has finished.
    """
    from onecurve.launcher.sweeps.check import find_folder
    from onecurve.launcher.sweeps.sweep_file import load_sweep

    _refuse_unread(options)
    found, overrides = load_sweep(options.sweep), allow(parse_keys(options.context), options.yes)
    folder = find_folder(found, overrides)
    if options.results:
        return _show(found, folder, _list_trials(found, overrides, folder), options)
    if options.slurm:
        return _submit(found, overrides, options)
    _refuse_several_nodes()
    return _search(found, overrides, folder, options)


def _refuse_unread(options: SweepOptions) -> None:
    """Refuse options that would be ignored."""
    if options.slurm and options.max_restarts:
        raise UsageError("--max-restarts: not with --slurm, which queues a lost job again by itself")
    if options.slurm and options.results:
        raise UsageError("--results starts nothing: leave --slurm out")
    for each in (*fields(ResourceOptions), *(each for each in fields(SweepOptions) if each.name == "at_once")):
        if not options.slurm and getattr(options, each.name) != each.default:
            raise UsageError(f"--{each.name.replace('_', '-')}: only --slurm reads it; add --slurm or remove it")


def _refuse_several_nodes() -> None:
    """A trial after the other is made by one launcher; on several nodes of a job there would be one on each."""
    from onecurve.launcher.facts.machine import find_slurm_step

    step = find_slurm_step(os.environ)
    if step is not None and step.num_nodes > 1:
        raise Unsuitable(
            f"this job has {step.num_nodes} nodes, and without --slurm a sweep runs on one; submit its trials from the login "
            f"node: onecurve sweep --slurm --nodes {step.num_nodes}"
        )


def _search(sweep: Sweep, overrides: Mapping[str, str], folder: Path, options: SweepOptions) -> int:
    from onecurve.launcher.cli.run import prepare_launch, supervise_launch
    from onecurve.launcher.facts.recipes import load_recipe
    from onecurve.launcher.launching.ending import Ending
    from onecurve.launcher.sweeps.check import check_sweep
    from onecurve.launcher.sweeps.search import Search
    from onecurve.launcher.sweeps.trials import load_trials
    from onecurve.launcher.views.terminal import print_note, wrap_fact
    from onecurve.training.launch_protocol import BAD_INPUT

    if load_recipe(sweep.recipe, overrides).recipe.resume == "never":
        overrides = {**overrides, "resume": "auto"}  # A sweep that goes on continues its own runs.
    begun = load_trials(sweep, overrides, folder)
    for warning in check_sweep(sweep, overrides, folder, begun):
        print_note(f"warning: {warning}")

    facts: list[str] = []

    def train(overrides: Mapping[str, str]) -> Ending:
        launch = prepare_launch(sweep.recipe, overrides, options)
        if launch.errors:  # Such as memory, which depends on the trial's settings.
            return Ending(BAD_INPUT, "; ".join(launch.errors))
        if list(launch.facts) != facts:
            facts[:] = launch.facts
            for line in facts:
                print_note(wrap_fact(line))
        return supervise_launch(launch, options)

    if options.dry_run:
        return _show(sweep, folder, _list_trials(sweep, overrides, folder), options)
    ending = Search(sweep, overrides, folder, train, print_note).run()
    return ending.exit_code or _show(sweep, folder, ending.trials, options)


def _list_trials(sweep: Sweep, overrides: Mapping[str, str], folder: Path) -> list[Trial]:
    """All trials that are known, as their run directories are now."""
    from onecurve.launcher.sweeps.settings import list_settings
    from onecurve.launcher.sweeps.trials import Trial, load_trials, read_trial

    trials = load_trials(sweep, overrides, folder)
    trials += [
        Trial(number=number, settings=settings)
        for number, settings in enumerate(list_settings(sweep))
        if number >= len(trials)
    ]
    return [trial if trial.is_over else read_trial(sweep, trial, folder) for trial in trials]


def _show(sweep: Sweep, folder: Path, trials: Sequence[Trial], options: SweepOptions) -> int:
    """Print the results, and compare the best in a table and on a page; returns 1 if all trials ended and none finished."""
    from onecurve.launcher.facts.history import load_history
    from onecurve.launcher.views.compare import build_comparison, print_comparison
    from onecurve.launcher.views.report import write_report
    from onecurve.launcher.views.sweep_table import build_results, list_best_runs, print_results
    from onecurve.training.launch_protocol import FAILED, FINISHED

    results = build_results(sweep, folder, trials)
    if options.as_json:
        print(json.dumps(results, indent=2))
    else:
        from rich.console import Console

        print_results(Console(), results)
        if len(best := list_best_runs(results, _MOST_COMPARED)) > 1:
            print_comparison(Console(), build_comparison([load_history(run) for run in best]))
        if best:
            print(f"report: {write_report(list_best_runs(results, _MOST_REPORTED), folder / 'report.html')}")
    has_ended = all(trial.is_over or trial.state == "failed" for trial in trials) and bool(trials)
    return FAILED if has_ended and results["best"] is None else FINISHED


def _submit(sweep: Sweep, overrides: Mapping[str, str], options: SweepOptions) -> int:
    from onecurve.launcher.cli.submit import submit_and_print

    return submit_and_print(sweep.recipe, overrides, options, sweep=options.sweep, at_once=options.at_once)
