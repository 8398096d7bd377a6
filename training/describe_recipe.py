"""Validate a recipe and print what the launcher needs to know of it, as one JSON object.

    python training/describe_recipe.py [--metrics] --config RECIPE.yaml [--key value ...]

The launcher runs this for a recipe whose task lies outside the project: that task's file may import anything, which the
launcher does not. With --metrics also the names of the task's metrics, for which most tasks import torch.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # This file's own checkout or wheel, whatever else is installed; and not this folder, whose names are not for all.
    sys.path[0] = next(str(folder) for folder in Path(__file__).resolve().parents if (folder / "onecurve").is_dir())

from onecurve.training.config import RecipeError, load_recipe, parse_arguments
from onecurve.training.tasks import find_task


def describe_recipe(arguments: Sequence[str]) -> dict[str, Any]:
    """The values, their sources and the columns that are read; or the problems."""
    words = [word for word in arguments if word != "--metrics"]
    try:
        resolved = load_recipe(*parse_arguments(words))
    except RecipeError as error:
        return {"origin": error.origin, "problems": error.problems}
    task = find_task(resolved.recipe.task)
    return {
        "values": resolved.recipe.model_dump(mode="json"),
        "sources": dict(resolved.sources),
        "eval_only": resolved.eval_only,
        "predicts_tokens": task.predicts_tokens,
        "processor": task.processor_kind.name,
        "one_example_a_row": task.one_example_a_row,
        "metrics": ["loss", *task(resolved.recipe).metric_names()] if len(words) < len(arguments) else [],
        "columns": {name: task.columns(resolved.recipe, with_targets=name == "all") for name in ("all", "inputs")},
    }


if __name__ == "__main__":
    print(json.dumps(describe_recipe(sys.argv[1:])))
