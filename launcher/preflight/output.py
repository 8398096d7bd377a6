"""Run directory and cache: writable, with enough disk space, and not holding a run of another recipe."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from onecurve.launcher.facts.shape import ModelShape
from onecurve.launcher.planning.data_estimate import count_recipe_steps, count_train_rows, find_doubt
from onecurve.launcher.planning.memory import count_checkpoint_bytes, count_final_bytes
from onecurve.launcher.planning.work import count_trained_parameters
from onecurve.launcher.preflight.findings import Finding, error, warning
from onecurve.launcher.units import GIB
from onecurve.training.cache import find_unwritable_folders
from onecurve.training.errors import BadInput
from onecurve.training.recipe_comparison import find_differing_keys
from onecurve.training.run_directory import MANIFEST_FILE, RunDirectory
from onecurve.training.schedule import count_most_checkpoints
from onecurve.training.writable import describe_unwritable, find_existing_parent

if TYPE_CHECKING:
    from onecurve.training.config import Recipe


def check_output(recipe: Recipe, is_evaluation: bool = False) -> list[Finding]:
    """Whether the run directory can be written to, and whether a run in it is of this recipe."""
    run = RunDirectory.of(recipe)
    findings = _check_writable("output_dir", run.path)
    has_own = bool(run.list_checkpoints())  # Then `resume` is not read any more.
    is_named = recipe.resume not in ("auto", "never") and not has_own
    if is_named and not (Path(recipe.resume) / MANIFEST_FILE).is_file():
        findings.append(
            error(f"resume: {recipe.resume!r} is not a checkpoint; use auto, never or the folder of a checkpoint")
        )
    if run.config.is_file() and not findings and not is_evaluation:
        findings += _compare_with_run(recipe, run)
    return findings


def _compare_with_run(recipe: Recipe, run: RunDirectory) -> list[Finding]:
    from onecurve.launcher.facts.recipes import load_recipe
    from onecurve.training.config import FREE_KEYS

    name = f"output_dir {str(run.path)!r}"
    if recipe.resume == "never":
        return [error(f"{name} already holds a run, and resume is never; choose another output_dir")]
    try:
        differing = find_differing_keys(run, recipe, FREE_KEYS, load_recipe)
    except BadInput as problem:
        return [error(str(problem))]
    if differing:
        return [error(f"{name} holds a run of another recipe: {'; '.join(differing)}. Choose another output_dir")]
    return []


def check_folders(recipe: Recipe | None = None) -> list[Finding]:
    """Whether caches and temporary files can be written: what a recipe needs of them, or without one all of them."""
    hub: tuple[str | None, ...] = ("a name on the hub",)
    if recipe is not None:
        hub = (recipe.model_name_or_path, recipe.tokenizer_name, recipe.dataset_name)
    return [error(problem) for problem in find_unwritable_folders(hub)]


def _check_writable(name: str, path: Path) -> list[Finding]:
    problem = describe_unwritable(path)
    return [error(f"{name} {str(path)!r}: {problem}; choose another folder")] if problem else []


def check_disk(recipe: Recipe, shape: ModelShape) -> list[Finding]:
    """Whether the disk has room for the checkpoints and final/, counted as training/recovery/checkpoints.py does."""
    run = RunDirectory.of(recipe)
    folder = find_existing_parent(run.path)
    free = shutil.disk_usage(folder).free
    here = sum(path.stat().st_size for folder in run.list_checkpoints() for path in folder.iterdir() if path.is_file())
    kept, is_known = _count_checkpoints(recipe)
    trained = count_trained_parameters(recipe, shape)
    each = count_checkpoint_bytes(shape, trained)
    needed = each * kept + count_final_bytes(shape, trained) - here
    if free < needed:
        return [
            error(
                f"output_dir: {kept} checkpoints and final/ need {needed / GIB:.1f} GiB more, but {folder} has {free / GIB:.1f} "
                "free; lower save_total_limit, save less often (checkpointing_steps) or choose another output_dir"
            )
        ]
    if not is_known and recipe.save_total_limit is None and free < 20 * needed:
        return [warning("save_total_limit is not set, so every checkpoint is kept: "
                         f"{each / GIB:.2f} GiB each, {free / GIB:.0f} GiB are free")]  # fmt: skip
    return []


def _count_checkpoints(recipe: Recipe) -> tuple[int, bool]:
    """The most checkpoints on disk at once, and whether this is exact: it depends on the number of steps."""
    if recipe.checkpointing_steps is None and recipe.metric_for_best_model is None:
        return count_most_checkpoints(recipe, 1, 1), True
    try:
        # Of examples that are not rows there are at least nearly as many.
        steps_per_epoch, num_steps = count_recipe_steps(recipe, count_train_rows(recipe))
    except BadInput:
        steps_per_epoch, num_steps = None, None
    if num_steps is not None and steps_per_epoch is not None:
        return count_most_checkpoints(recipe, steps_per_epoch, num_steps), not find_doubt(recipe)
    return (recipe.save_total_limit or 1) + 1 + (recipe.metric_for_best_model is not None), False
