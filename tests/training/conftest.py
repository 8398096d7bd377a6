"""Recipes and run directories."""

from __future__ import annotations

from pathlib import Path

from onecurve.training.config import ResolvedRecipe, load_recipe
from onecurve.training.recovery.run_creation import create_run
from onecurve.training.recovery.run_lock import RunLock
from onecurve.training.run_directory import RunDirectory


def resolve(folder: Path, **flags: str) -> ResolvedRecipe:
    return load_recipe(None, {"model_name_or_path": "m", "train_file": "t.csv", "output_dir": str(folder), **flags})


def make_run(folder: Path) -> RunDirectory:
    """A run directory that a training has been in."""
    resolved = resolve(folder)
    run = RunDirectory.of(resolved.recipe)
    with RunLock(run) as lock:
        create_run(run, lock, resolved, {})
    return run
