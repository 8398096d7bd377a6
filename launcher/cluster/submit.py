"""`onecurve submit`: checks on the login node, so that a job does not wait in the queue for hours and then fail."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from onecurve.launcher.cluster.jobs import note_job
from onecurve.launcher.cluster.request import Request
from onecurve.launcher.cluster.sbatch import (
    Submission,
    check_folder,
    check_submission,
    render_comparison,
    render_sweep,
    render_training,
    submit,
)
from onecurve.launcher.cluster.sweep import copy_sweep, list_runs, load_array_sweep
from onecurve.launcher.errors import LaunchFailed, PreflightFailed, Unsuitable
from onecurve.launcher.facts.recipes import load_recipe
from onecurve.launcher.planning.configs import resolve_config
from onecurve.launcher.preflight import check_inputs
from onecurve.launcher.sweeps.check import check_sweep, find_folder


@dataclass(frozen=True)
class Submitted:
    """What was sent to Slurm.

    Attributes:
        job_id: None after a dry run.
        comparison_id: the job that compares the runs of an array.
        commands: the sbatch commands, as a shell would take them.
        runs: run directories, one per task.
    """

    job_id: str | None
    comparison_id: str | None
    commands: tuple[str, ...]
    runs: tuple[str, ...]


def submit_request(root: Path, request: Request, dry_run: bool, report: Callable[[str], None]) -> Submitted:
    """Check the recipe, its files, and whether Slurm accepts the resources; then submit, unless it is a dry run.

    Args:
        report: prints a line for the user.

    Raises:
        RecipeError: the recipe, or that of a run of the sweep, is wrong.
        PreflightFailed: model, data or run directory have errors.
        UsageError: a value can't be passed to Slurm.
        UnknownTopology: there is no such topology.
        Unsuitable: Slurm refuses it, or there is no Slurm on this machine.
    """
    check_folder(Path.cwd())
    if request.recipe.startswith("-"):
        request = replace(request, recipe=f"./{request.recipe}")
    if request.topology is not None:
        resolve_config(root, request.topology)
    if request.sweep is None:
        folder, settings = (
            Path(load_recipe(request.recipe, request.overrides).recipe.output_dir),
            [dict(request.overrides)],
        )
        settings[0]["output_dir"] = str(folder)
    else:
        sweep = load_array_sweep(request.sweep)
        folder, settings = find_folder(sweep, request.overrides), list_runs(sweep, request.overrides)
    runs = tuple(overrides["output_dir"] for overrides in settings)
    submission = _render(root, request, folder, len(runs))
    if request.sweep is None:
        _check_inputs(request.recipe, settings[0], report)
    else:
        for message in check_sweep(sweep, request.overrides, folder):
            report(f"warning: {message}")
    report(check_submission(submission))
    if dry_run:
        submissions = [submission, *([render_comparison(root, request, "JOB")] if _is_compared(request, runs) else [])]
        return Submitted(None, None, tuple(each.to_shell() for each in submissions), runs)
    return _submit(root, request, folder, runs, report)


def _render(root: Path, request: Request, folder: Path, num_runs: int) -> Submission:
    if request.sweep is None:
        return render_training(root, request, folder.absolute())
    return render_sweep(root, request, folder.absolute(), num_runs)


def _is_compared(request: Request, runs: Sequence[str]) -> bool:
    return request.sweep is not None and len(runs) > 1


def _submit(
    root: Path, request: Request, folder: Path, runs: tuple[str, ...], report: Callable[[str], None]
) -> Submitted:
    if request.sweep is not None:
        request = replace(request, sweep=copy_sweep(request.sweep, folder))
    submissions = [_render(root, request, folder, len(runs))]
    job_id, comparison_id = submit(submissions[0]), None
    report(f"job {job_id} is submitted")  # Printed first, so that the number is known whatever fails below.
    note_job(folder, job_id)
    if request.sweep is not None:
        for number, run in enumerate(runs):
            note_job(Path(run), f"{job_id}_{number}")
    if _is_compared(request, runs):
        submissions.append(render_comparison(root, request, job_id))
        try:
            comparison_id = submit(submissions[1])
        except (LaunchFailed, Unsuitable) as error:
            raise Unsuitable(
                f"job {job_id} is submitted, but the job that compares its runs is not: {error}. Submit it by hand: "
                f"{submissions[1].to_shell()}"
            ) from None
    return Submitted(job_id, comparison_id, tuple(each.to_shell() for each in submissions), runs)


def _check_inputs(recipe: str, overrides: Mapping[str, str], report: Callable[[str], None]) -> None:
    """Check the model, the data and the run directory."""
    findings = check_inputs(load_recipe(recipe, overrides).recipe)
    for finding in findings:
        if finding.severity == "warning":
            report(f"warning: {finding.message}")
    errors = [finding.message for finding in findings if finding.severity == "error"]
    if errors:
        raise PreflightFailed(errors)
