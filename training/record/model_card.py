"""README.md of final/: what was trained on what, and how well it does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from onecurve.training.recipe import Recipe
from onecurve.training.tasks.base import Task


def build_model_card(recipe: Recipe, task: Task, metrics: Mapping[str, float]) -> str:
    """README.md of final/: what it was trained on, how, and how well it does."""
    data = recipe.dataset_name or ", ".join(Path(path).name for path in recipe.train_file or ())
    rows = "\n".join(f"| {name} | {value:.4f} |" for name, value in metrics.items())
    settings = "\n".join(
        f"- {key}: {getattr(recipe, key)}"
        for key in (
            "train_batch_size",
            "learning_rate",
            "lr_scheduler_type",
            "num_train_epochs",
            "mixed_precision",
            "seed",
        )
    )
    name = recipe.model_name_or_path
    base = "" if Path(name).exists() else f"base_model: {json.dumps(name)}\n"  # A name on the hub.
    library = "transformers" if recipe.adapter == "none" else "peft"
    return (
        f"---\nlibrary_name: {library}\n{base}pipeline_tag: {task.pipeline_tag}\n---\n\n"
        f"# {Path(recipe.model_name_or_path).name}, fine-tuned on {data}\n\n{task.describe_card()}"
        f"| metric on the validation data | value |\n|---|---|\n{rows}\n\nSettings:\n\n{settings}\n\n"
        "Trained with Onecurve.\n"
    )
