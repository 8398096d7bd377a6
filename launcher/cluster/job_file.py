"""`onecurve submit --to PLATFORM`: check the recipe, render the platform's job file, write it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from onecurve.launcher.cluster.elsewhere import Place, name_job
from onecurve.launcher.cluster.kubernetes import render_kubernetes
from onecurve.launcher.cluster.request import Request
from onecurve.launcher.cluster.skypilot import render_skypilot
from onecurve.launcher.errors import UsageError
from onecurve.launcher.facts.recipes import load_recipe
from onecurve.launcher.planning.configs import resolve_config

Platform = Literal["skypilot", "kubernetes"]


@dataclass(frozen=True)
class WrittenJob:
    """A job file.

    Attributes:
        path: where it is, or would be.
        text: its content.
        command: what submits it.
    """

    path: str
    text: str
    command: str


def write_job_file(
    root: Path,
    platform: Platform,
    request: Request,
    place: Place,
    path: Path | None,
    dry_run: bool,
    report: Callable[[str], None],
) -> WrittenJob:
    """Render a job file and write it, unless it is a dry run. Model and data are checked by each node, where they are.

    Args:
        path: of the file; None: JOB-PLATFORM.yaml in the working directory.
        report: prints a line for the user.

    Raises:
        RecipeError: the recipe is wrong.
        UnknownTopology: there is no such topology.
        UsageError: an option is missing or wrong, or another file stands at `path`.
    """
    if request.recipe.startswith("-"):
        request = replace(request, recipe=f"./{request.recipe}")
    recipe = load_recipe(request.recipe, request.overrides).recipe
    if request.topology is not None:
        resolve_config(root, request.topology)
    job = (
        render_kubernetes(request, place)
        if platform == "kubernetes"
        else render_skypilot(request, place, recipe.output_dir)
    )
    path = path or Path(f"{name_job(request)}-{platform}.yaml")
    if recipe.checkpointing_steps is None and recipe.metric_for_best_model is None:
        report(
            "warning: the recipe writes no checkpoints while it trains, so after a lost machine the job would begin at its "
            "first step: set checkpointing_steps"
        )
    if not dry_run:
        _write(path, job.text)
    return WrittenJob(str(path), job.text, job.to_shell(path))


def _write(path: Path, text: str) -> None:
    try:
        if path.exists() and path.read_text(encoding="utf-8") != text:
            raise UsageError(f"{path} exists and is another file: remove it, or name another one with --output")
        path.write_text(text, encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} can't be written: {error}") from None
