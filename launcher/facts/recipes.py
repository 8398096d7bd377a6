"""A recipe as the launcher sees it. A task outside the project is looked at in a process of its own: it may import torch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import PrivateAttr, create_model

from onecurve.training.config import Recipe, RecipeError, ResolvedRecipe, find_task_name
from onecurve.training.config import load_recipe as load_own_recipe
from onecurve.training.tasks import TASKS, Task, build_task, find_task, is_outside
from onecurve.training.tasks.base import TokenCounter, estimate_text
from onecurve.training.tasks.processors import KINDS, TOKENIZER, ProcessorKind

_DESCRIBE = Path(__file__).resolve().parents[2] / "training" / "describe_recipe.py"

Columns = dict[str, list[str]]


class _OutsideRecipe(Recipe):
    """A recipe whose task lies outside the project; validated by that task already."""

    _columns: dict[str, Columns] = PrivateAttr(default_factory=dict)
    _predicts_tokens: bool = PrivateAttr(default=False)
    _processor: str = PrivateAttr(default=TOKENIZER.name)
    _one_example_a_row: bool = PrivateAttr(default=True)


def load_recipe(path: str | None, flags: Mapping[str, str] | None = None) -> ResolvedRecipe:
    """Read and validate a recipe, whatever its task.

    Raises:
        RecipeError: naming every problem at once.
    """
    if not is_outside(find_task_name(path, flags)):
        return load_own_recipe(path, flags)
    answer = _describe(path, flags)
    return ResolvedRecipe(_build(answer["values"], answer), answer["sources"], answer["eval_only"])


def list_task_metrics(path: str, flags: Mapping[str, str]) -> list[str]:
    """Names of what the recipe's task measures, without prefix. Asked in a process of its own, which imports torch.

    Raises:
        RecipeError: as `load_recipe`.
    """
    return list(_describe(path, flags, "--metrics")["metrics"])


def _describe(path: str | None, flags: Mapping[str, str] | None, *options: str) -> dict[str, Any]:
    words = [*options] if path is None else [*options, "--config", path]
    words += [f"--{key}={value}" for key, value in (flags or {}).items()]
    result = subprocess.run([sys.executable, str(_DESCRIBE), *words], capture_output=True, text=True, check=False)
    try:
        last_line = result.stdout.strip().rpartition("\n")[2]  # The task's file may print before.
        answer: dict[str, Any] = json.loads(last_line)
    except ValueError:
        reason = result.stderr.strip().rpartition("\n")[2] or f"exit code {result.returncode}"
        raise RecipeError(path or "the command line", [f"task: its file could not be read: {reason}"]) from None
    if "problems" in answer:
        raise RecipeError(answer["origin"], answer["problems"])
    return answer


def _build(values: Mapping[str, Any], answer: Mapping[str, Any]) -> Recipe:
    own: dict[str, Any] = {key: (Any, value) for key, value in values.items() if key not in Recipe.model_fields}
    recipe = create_model("OutsideRecipe", __base__=_OutsideRecipe, **own)(**values)
    recipe._columns, recipe._predicts_tokens = answer["columns"], answer["predicts_tokens"]
    recipe._processor, recipe._one_example_a_row = answer["processor"], answer["one_example_a_row"]
    return recipe


def find_columns(recipe: Recipe, with_targets: bool = True) -> Columns:
    """Names of the columns that the recipe's task reads, by the key that names them."""
    if isinstance(recipe, _OutsideRecipe):
        return recipe._columns["all" if with_targets else "inputs"]
    return find_task(recipe.task).columns(recipe, with_targets)


def load_defaults(task: str) -> dict[str, Any]:
    """The default of each key that has one, as YAML holds it; of a task outside the project only those of every recipe."""
    kind = find_task(task).recipe_class if task in TASKS else Recipe
    fields = {
        key: field.get_default(call_default_factory=True)
        for key, field in kind.model_fields.items()
        if not field.is_required()
    }
    return {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}


def predicts_tokens(recipe: Recipe) -> bool:
    """Whether the recipe's model has an output for each word of its vocabulary at each token."""
    return recipe._predicts_tokens if isinstance(recipe, _OutsideRecipe) else find_task(recipe.task).predicts_tokens


def find_processor_kind(recipe: Recipe) -> ProcessorKind:
    """What makes of the recipe's rows what its model reads: a tokenizer, or an image processor."""
    return KINDS[recipe._processor] if isinstance(recipe, _OutsideRecipe) else find_task(recipe.task).processor_kind


def gives_one_example_a_row(recipe: Recipe) -> bool:
    """Whether there are as many examples as rows; else their number is known when they are prepared."""
    if isinstance(recipe, _OutsideRecipe):
        return recipe._one_example_a_row
    return find_task(recipe.task).one_example_a_row


def holds_out_by_label(recipe: Recipe) -> bool:
    """Whether rows are held out in each label's share, so that their number depends on the labels of all rows."""
    return isinstance(recipe, _OutsideRecipe) or find_task(recipe.task).strata is not Task.strata


def estimate_examples(recipe: Recipe, rows: Sequence[Mapping[str, Any]], counter: TokenCounter) -> list[list[int]]:
    """For each example of some rows the tokens of each of its sequences; none of a row that the task refuses.

    Of a task outside the project nothing is known: as if it put all texts of a row behind each other.
    """
    if isinstance(recipe, _OutsideRecipe):
        columns = [name for names in find_columns(recipe, with_targets=False).values() for name in names]
        of_rows = [estimate_text([row.get(name) for name in columns], counter, recipe.max_length) for row in rows]
    else:
        task = build_task(recipe)
        of_rows = [task.estimate_examples(row, counter) for row in rows if not task.find_row_problem(row)]
    return [example for examples in of_rows for example in examples]


def find_row_problem(recipe: Recipe, row: Mapping[str, Any], with_targets: bool = True) -> str | None:
    """What the recipe's task sees wrong with a row; of a task outside the project nothing is known."""
    return None if isinstance(recipe, _OutsideRecipe) else build_task(recipe).find_row_problem(row, with_targets)
