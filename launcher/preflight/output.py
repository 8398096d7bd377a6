"""Where the results and prepared data go: writable, with room, and not another recipe's run."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from onecurve.launcher.facts.data_files import UnreadableData
from onecurve.launcher.facts.machine import GIB
from onecurve.launcher.facts.shape import ModelShape
from onecurve.launcher.planning.memory import count_checkpoint_bytes, count_final_bytes
from onecurve.launcher.planning.plan import count_examples, count_steps
from onecurve.launcher.preflight.findings import Finding, error, warning

if TYPE_CHECKING:
    from onecurve.training.config import Recipe


def check_output(recipe: Recipe, is_evaluation: bool = False) -> list[Finding]:
    """Whether the run directory can be written, and whether the run that it may hold is this recipe's."""
    path = Path(recipe.output_dir)
    findings = _check_writable("output_dir", path)
    has_own = any((path / "checkpoints").glob("step_*"))  # Then a named one does not count any more.
    is_named = recipe.resume not in ("auto", "never") and not has_own
    if is_named and not (Path(recipe.resume) / "manifest.json").is_file():
        findings.append(
            error(f"resume: {recipe.resume!r} is no checkpoint; it is auto, never or a checkpoint's folder")
        )
    if (path / "config.yaml").is_file() and not findings and not is_evaluation:
        findings += _compare_with_run(recipe, path)
    return findings


def _compare_with_run(recipe: Recipe, path: Path) -> list[Finding]:
    from onecurve.training.config import FREE_KEYS, RecipeError, load_recipe

    if recipe.resume == "never":
        return [error(f"output_dir {str(path)!r} holds a run already, and resume is never; choose another output_dir")]
    try:
        here = load_recipe(str(path / "config.yaml")).recipe
    except RecipeError as problem:
        return [error(f"output_dir {str(path)!r} holds a run whose config.yaml is not valid: {problem}")]
    differing = [
        f"{key} ({getattr(here, key)!r} there, {getattr(recipe, key)!r} here)"
        for key in type(here).model_fields
        if key not in FREE_KEYS and getattr(here, key) != getattr(recipe, key)
    ]
    if differing:
        return [
            error(
                f"output_dir {str(path)!r} holds a run of another recipe: {'; '.join(differing)}. Choose another output_dir"
            )
        ]
    return []


def check_cache() -> list[Finding]:
    """Whether prepared data can be kept."""
    cache = Path(os.environ.get("ONECURVE_CACHE", Path.home() / ".cache" / "onecurve"))
    return _check_writable("$ONECURVE_CACHE, the cache of prepared data,", cache)


def _check_writable(name: str, path: Path) -> list[Finding]:
    nearest = _nearest_existing(path)
    if not nearest.is_dir():
        return [error(f"{name} {str(path)!r}: {str(nearest)!r} is a file; choose another folder")]
    if not os.access(nearest, os.W_OK | os.X_OK):
        return [error(f"{name} {str(path)!r}: {str(nearest)!r} is not writable; choose another folder")]
    return []


def _nearest_existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def check_disk(recipe: Recipe, shape: ModelShape) -> list[Finding]:
    """Whether checkpoints and final/ have room beside those that are there; counted as training/recovery/checkpoints.py does."""
    folder = _nearest_existing(Path(recipe.output_dir))
    free = shutil.disk_usage(folder).free
    here = sum(path.stat().st_size for path in Path(recipe.output_dir).glob("checkpoints/step_*/*") if path.is_file())
    kept, is_known = _count_checkpoints(recipe)
    needed = count_checkpoint_bytes(shape) * kept + count_final_bytes(shape) - here
    if free < needed:
        return [
            error(
                f"output_dir: {kept} checkpoints and final/ take {needed / GIB:.1f} GiB more, {folder} has {free / GIB:.1f} "
                "free; lower save_total_limit, save less often (checkpointing_steps) or choose another output_dir"
            )
        ]
    if not is_known and recipe.save_total_limit is None and free < 20 * needed:
        return [warning("save_total_limit is not set: every checkpoint is kept, "
                         f"{count_checkpoint_bytes(shape) / GIB:.2f} GiB each, {free / GIB:.0f} GiB are free")]  # fmt: skip
    return []


def _count_checkpoints(recipe: Recipe) -> tuple[int, bool]:
    """The most checkpoints that lie there at once, and whether the number of steps, which that depends on, is known."""
    from onecurve.training.config import count_most_checkpoints

    if recipe.checkpointing_steps is None and recipe.metric_for_best_model is None:
        return count_most_checkpoints(recipe, 1, 1), True
    try:
        steps_per_epoch, num_steps = count_steps(recipe, count_examples(recipe))
    except (UnreadableData, OSError):
        steps_per_epoch, num_steps = None, None
    if num_steps is not None and steps_per_epoch is not None:
        return count_most_checkpoints(recipe, steps_per_epoch, num_steps), True
    return (recipe.save_total_limit or 1) + 1 + (recipe.metric_for_best_model is not None), False
