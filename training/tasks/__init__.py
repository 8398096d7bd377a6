"""Tasks: one file each. A recipe names a task, or a class in a file of its own: `task: path/to/my_task.py:MyTask`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from onecurve.training.errors import BadInput
from onecurve.training.recipe import Recipe, RecipeError, find_nearest
from onecurve.training.tasks.base import Task

__all__ = ["TASKS", "Task", "build_task", "find_task", "is_outside"]

# Where each task stands: module and class. Modules are imported when a recipe names their task.
TASKS = {
    "text_classification": ("onecurve.training.tasks.text_classification", "TextClassification"),
    "token_classification": ("onecurve.training.tasks.token_classification", "TokenClassification"),
    "multiple_choice": ("onecurve.training.tasks.multiple_choice", "MultipleChoice"),
    "question_answering": ("onecurve.training.tasks.question_answering", "QuestionAnswering"),
    "seq2seq_lm": ("onecurve.training.tasks.seq2seq_lm", "Seq2SeqLM"),
    "causal_lm": ("onecurve.training.tasks.causal_lm", "CausalLM"),
    "masked_lm": ("onecurve.training.tasks.masked_lm", "MaskedLM"),
    "image_classification": ("onecurve.training.tasks.image_classification", "ImageClassification"),
}


def is_outside(name: str) -> bool:
    """Whether a task's name is that of a file outside the project: `path/to/my_task.py:MyTask`."""
    return name.rpartition(":")[0].endswith(".py")


def find_task(name: str) -> type[Task]:
    """The class of a task by its name in a recipe.

    Raises:
        RecipeError: there is none of that name, or the file that it names can't be imported.
    """
    if is_outside(name):
        return _import_file(name)
    known = name.replace("-", "_")
    if known not in TASKS:
        nearest = find_nearest(known, list(TASKS))
        hint = f"; did you mean {nearest}?" if nearest else ""
        raise RecipeError(
            "task", [f"task: {name!r} is none of {', '.join(TASKS)}, nor path/to/my_task.py:MyTask{hint}"]
        )
    module, class_name = TASKS[known]
    found: type[Task] = getattr(importlib.import_module(module), class_name)
    return found


def _import_file(name: str) -> type[Task]:
    file, _, class_name = name.rpartition(":")
    path = Path(file).expanduser()
    if not path.is_file():
        raise RecipeError("task", [f"task: {file!r} does not exist"])
    module_name = f"onecurve_task_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None, "the file's name ends in .py"
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # As an import would: dataclasses and pydantic look their module up.
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # Whatever the file does.
        raise RecipeError("task", [f"task: {file!r} can't be imported: {type(error).__name__}: {error}"]) from error
    found: Any = getattr(module, class_name, None)
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise RecipeError("task", [f"task: {file!r} has no class {class_name!r} that is a subclass of Task"])
    return found


def build_task(recipe: Recipe) -> Task:
    """The task that a recipe names.

    Raises:
        BadInput: the task does not measure the recipe's metric_for_best_model.
    """
    task = find_task(recipe.task)(recipe)
    wanted = (recipe.metric_for_best_model or "loss").removeprefix("eval_")
    if wanted != "loss" and wanted not in (names := task.metric_names()):
        nearest = find_nearest(wanted, names)
        raise BadInput(
            f"metric_for_best_model: {recipe.metric_for_best_model} is not measured; there are "
            f"{', '.join(f'eval_{name}' for name in ('loss', *names))}"
            + (f"; did you mean eval_{nearest}?" if nearest else "")
        )
    return task
