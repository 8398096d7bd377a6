"""`onecurve submit`: everything that can be wrong is found on the login node, before a job waits for hours to find it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from onecurve.launcher.cluster.sweep import build_runs, copy_sweep
from onecurve.launcher.errors import LaunchFailed, PreflightFailed, Unsuitable, UsageError
from onecurve.launcher.facts.recipes import load_recipe
from onecurve.launcher.planning.configs import resolve_config
from onecurve.launcher.preflight import check_inputs


@dataclass(frozen=True)
class Submitted:
    """What was sent to Slurm.

    Attributes:
        job_id: None after a dry run.
        comparison_id: the job that compares the runs of an array.
        commands: the sbatch commands, as a shell would take them.
        runs: run directories, one for each task.
    """

    job_id: str | None
    comparison_id: str | None
    commands: tuple[str, ...]
    runs: tuple[str, ...]


def submit_request(root: Path, request: Request, dry_run: bool, say: Callable[[str], None]) -> Submitted:
    """Check the recipe, its files and what Slurm thinks of the resources; then submit, unless it is a dry run.

    Raises:
        RecipeError: the recipe, or that of a run of the sweep, is wrong.
        PreflightFailed: model, data or run directory are.
        UsageError: a value can't be carried to Slurm.
        UnknownTopology: there is no such topology.
        Unsuitable: Slurm refuses it, or is not here.
    """
    check_folder(Path.cwd())
    if request.recipe.startswith("-"):
        request = replace(request, recipe=f"./{request.recipe}")
    if request.topology is not None:
        resolve_config(root, request.topology)
    if request.sweep is None and request.at_once is not None:
        raise UsageError("--at-once: only an --array has tasks")
    folder = Path(load_recipe(request.recipe, request.overrides).recipe.output_dir)
    if request.sweep is None:
        settings = [{**request.overrides, "output_dir": str(folder)}]
    else:
        settings = build_runs(request.recipe, request.sweep, request.overrides)
    runs = tuple(overrides["output_dir"] for overrides in settings)
    submission = _render(root, request, folder, len(runs))
    _check_inputs(request.recipe, settings, say)
    say(check_submission(submission))
    if dry_run:
        submissions = [submission, *([render_comparison(root, request, "JOB")] if _is_compared(request, runs) else [])]
        return Submitted(None, None, tuple(each.to_shell() for each in submissions), runs)
    return _submit(root, request, folder, runs, say)


def _render(root: Path, request: Request, folder: Path, num_runs: int) -> Submission:
    if request.sweep is None:
        return render_training(root, request, folder.absolute())
    return render_sweep(root, request, folder.absolute(), num_runs)


def _is_compared(request: Request, runs: Sequence[str]) -> bool:
    return request.sweep is not None and len(runs) > 1


def _submit(root: Path, request: Request, folder: Path, runs: tuple[str, ...], say: Callable[[str], None]) -> Submitted:
    if request.sweep is not None:
        request = replace(request, sweep=copy_sweep(request.sweep, folder))
    submissions = [_render(root, request, folder, len(runs))]
    job_id, comparison_id = submit(submissions[0]), None
    say(f"job {job_id} is submitted")  # Whatever fails below, its number is known.
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
                f"job {job_id} is submitted, but not the job that compares its runs: {error}. Submit that by hand: "
                f"{submissions[1].to_shell()}"
            ) from None
    return Submitted(job_id, comparison_id, tuple(each.to_shell() for each in submissions), runs)


def _check_inputs(recipe: str, settings: list[dict[str, str]], say: Callable[[str], None]) -> None:
    """Look at the model, the data and the run directory of every run; what several have in common is told once."""
    findings = [finding for overrides in settings for finding in check_inputs(load_recipe(recipe, overrides).recipe)]
    for message in dict.fromkeys(finding.message for finding in findings if finding.severity == "warning"):
        say(f"warning: {message}")
    errors = list(dict.fromkeys(finding.message for finding in findings if finding.severity == "error"))
    if errors:
        raise PreflightFailed(errors)
