"""Reading a recipe: a flat YAML file, flags over it, defaults below it; validated before anything heavy is imported.

A flag beats the recipe, the recipe beats the default, and every resolved value remembers which of the three it came from::

    accelerate launch training/run.py --config training/recipes/demo.yaml --learning_rate 3e-5

All problems of a recipe are reported at once, each with the nearest valid name or the bound it breaks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ValidationError

from onecurve.training import recipe_yaml
from onecurve.training.recipe import ADAPTER_KEYS, FREE_KEYS, Recipe, RecipeError, find_nearest
from onecurve.training.recipe_yaml import Nodes, compose_recipe, construct_values, parse_flag
from onecurve.training.tasks import TASKS, Task, find_task

__all__ = [
    "FREE_KEYS",
    "Recipe",
    "RecipeError",
    "ResolvedRecipe",
    "all_keys",
    "build_recipe",
    "describe_errors",
    "find_nearest",
    "find_task_name",
    "known_keys",
    "load_recipe",
    "parse_arguments",
]

Source = Literal["flag", "recipe", "default"]


@dataclass(frozen=True)
class ResolvedRecipe:
    """A recipe and where each of its values came from.

    Attributes:
        eval_only: evaluate what was trained instead of training; a flag of one start, no setting of a run.
    """

    recipe: Recipe
    sources: Mapping[str, Source]
    eval_only: bool = False

    def to_yaml(self) -> str:
        """The text of `config.yaml`: itself a recipe, each value's source in a comment behind it."""
        lines = ["# Every resolved value and its source. This file is itself a recipe: train it again with --config."]
        values = self.recipe.model_dump(mode="json", include=set(self.sources))  # The task does not read the others.
        for key, value in values.items():
            text = yaml.safe_dump(value, default_flow_style=True, width=math.inf, allow_unicode=True)
            if yaml.safe_load(text.removesuffix("...\n").strip(" \n")) != value:  # YAML folds some rare spaces.
                text = yaml.safe_dump(value, default_flow_style=True, width=math.inf)
            text = text.removesuffix("...\n").rstrip("\n")  # A lone scalar is dumped with a document end behind it.
            lines.append(f"{key}: {text}  # {self.sources[key]}")
        return "\n".join(lines) + "\n"


def parse_arguments(arguments: Sequence[str]) -> tuple[str | None, dict[str, str]]:
    """Split `--config FILE --key value --key=value --eval_only` into the recipe's path and the overriding flags.

    Raises:
        RecipeError: for a word that is no flag, a flag without a value, or one given twice.
    """
    path: str | None = None
    flags: dict[str, str] = {}
    problems: list[str] = []
    words = list(arguments)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            problems.append(f"{word!r}: expected --key value")
            continue
        key, equals, value = word[2:].partition("=")
        key = key.replace("-", "_")
        if key == "eval_only" and not equals:
            flags[key] = "true"
            continue
        if not equals:
            if not words or words[0].startswith("--"):
                problems.append(f"--{key}: needs a value")
                continue
            value = words.pop(0)
        if key == "config":
            if path is not None:
                problems.append("--config: given twice")
            path = value
        elif key in flags:
            problems.append(f"--{key}: given twice")
        else:
            flags[key] = value
    if problems:
        raise RecipeError("the command line", problems)
    return path, flags


def find_task_name(path: str | None, flags: Mapping[str, str] | None = None) -> str:
    """The task that a recipe file or a flag names, before anything is validated.

    Raises:
        RecipeError: the file can't be read.
    """
    nodes = compose_recipe(path) if path is not None else {}
    return _name_task(nodes, flags or {})


def _name_task(nodes: Nodes, flags: Mapping[str, str]) -> str:
    return flags.get("task") or recipe_yaml.find_task(nodes) or str(Recipe.model_fields["task"].default)


def load_recipe(path: str | None, flags: Mapping[str, str] | None = None) -> ResolvedRecipe:
    """Read a recipe file, put the flags over it and validate the whole.

    Raises:
        RecipeError: naming every unknown key, wrong type and broken bound at once.
    """
    flags = dict(flags or {})
    eval_only = flags.pop("eval_only", "false").lower() == "true"
    nodes = compose_recipe(path) if path is not None else {}
    origin = path if path is not None else "the command line"
    try:
        task = find_task(_name_task(nodes, flags))
    except RecipeError as error:
        raise RecipeError(origin, error.problems) from None
    from_file = construct_values(origin, nodes, task.recipe_class)
    from_flags = {key: parse_flag(task.recipe_class, key, value) for key, value in flags.items()}
    recipe = _validate(task, {**from_file, **from_flags}, origin)
    sources: dict[str, Source] = {
        key: "flag" if key in from_flags else "recipe" if key in from_file else "default" for key in known_keys(task)
    }
    return ResolvedRecipe(recipe, sources, eval_only)


def build_recipe(values: Mapping[str, Any]) -> Recipe:
    """A recipe of the values that a YAML file would hold.

    Raises:
        RecipeError: as `load_recipe`.
    """
    return _validate(find_task(str(values.get("task", Recipe.model_fields["task"].default))), values, "the recipe")


def known_keys(task: type[Task]) -> list[str]:
    """Keys that a task reads: those of every recipe and its own."""
    return [key for key in task.recipe_class.model_fields if key not in task.unread_keys]


def all_keys() -> list[str]:
    """Keys that any task of the project reads."""
    return list(dict.fromkeys(key for name in TASKS for key in known_keys(find_task(name))))


def _validate(task: type[Task], values: Mapping[str, Any], origin: str) -> Recipe:
    kind, keys = task.recipe_class, known_keys(task)
    problems = [_describe_unknown(key, task) for key in values if key not in keys]
    known = {key: value for key, value in values.items() if key in keys}
    try:
        recipe = kind(**known)
    except ValidationError as error:
        problems += describe_errors(error, kind)
        wrong = {str(detail["loc"][0]) for detail in error.errors() if detail["loc"]}
        remainder = _build_remainder(kind, {key: value for key, value in known.items() if key not in wrong})
        if remainder is not None:  # Of two keys that contradict each other, both must be known.
            problems += [
                line
                for line in find_contradictions(remainder, task)
                if not wrong.intersection(re.findall(r"\w+", line))
            ]
        raise RecipeError(origin, problems, remainder) from None
    problems += find_contradictions(recipe, task)
    if problems:
        raise RecipeError(origin, problems, recipe)
    return recipe


def _build_remainder(kind: type[Recipe], values: Mapping[str, Any]) -> Recipe | None:
    try:
        return kind(**values)
    except ValidationError:  # A key that every recipe needs is among the wrong ones.
        return None


def find_contradictions(recipe: Recipe, task: type[Task]) -> list[str]:
    """Problems between keys that are each valid alone, one line each."""
    problems = []
    if recipe.dataset_name is None and recipe.train_file is None:
        problems.append("train_file or dataset_name: one of them must say what to train on")
    if recipe.dataset_name is not None and recipe.train_file is not None:
        problems.append("train_file and dataset_name: give one of them, not both")
    if recipe.num_warmup_steps and recipe.warmup_ratio:
        problems.append("num_warmup_steps and warmup_ratio: give one of them, not both")
    counts_by_max_length = "max_length" not in task.unread_keys  # Of images the model says how many tokens they are.
    if counts_by_max_length and (recipe.per_device_batch_tokens or recipe.max_length) < recipe.max_length:
        problems.append(
            f"per_device_batch_tokens: {recipe.per_device_batch_tokens} cannot hold one example of max_length "
            f"{recipe.max_length}; raise it to at least {recipe.max_length} or lower max_length"
        )
    if recipe.early_stopping_patience is not None and recipe.metric_for_best_model is None:
        problems.append("early_stopping_patience: needs metric_for_best_model to say what 'better' means")
    return problems + _find_adapter_contradictions(recipe) + task.find_contradictions(recipe)


def _find_adapter_contradictions(recipe: Recipe) -> list[str]:
    changed = [key for key in ADAPTER_KEYS if getattr(recipe, key) != Recipe.model_fields[key].default]
    if recipe.adapter == "none":
        return [f"{key}: only an adapter reads it; set adapter: lora, or remove it" for key in changed]
    own = [key for key in changed if key not in ("adapter_name_or_path", "base_dtype", "quantization", "merge_adapter")]
    if recipe.adapter_name_or_path is not None and own:
        return [f"{key}: adapter_name_or_path brings its own; remove one of them" for key in own]
    if recipe.base_dtype == "bfloat16" and recipe.mixed_precision != "bf16":
        return ["base_dtype: bfloat16 needs mixed_precision: bf16, because a product has one type"]
    if recipe.quantization != "none":
        if recipe.torch_compile:
            return ["quantization: nf4 is not compiled; remove torch_compile"]
        if recipe.merge_adapter:
            return [
                "merge_adapter: a merge loses something with quantization: nf4, so it asks first: `onecurve merge RUN --yes`"
            ]
    if recipe.freeze:
        return ["freeze: an adapter leaves all weights of the model as they are; remove one of them"]
    if recipe.layerwise_lr_decay != 1:
        return [
            "layerwise_lr_decay: an adapter leaves the model's layers as they are, and begins as new in each of them; remove "
            "one of them"
        ]
    return []


def _describe_unknown(key: str, task: type[Task]) -> str:
    readers = [name for name in TASKS if find_task(name) is not task and key in known_keys(find_task(name))]
    if readers:
        return f"{key}: task {task.__name__} does not read it, {', '.join(readers)} does; remove it or change the task"
    nearest = find_nearest(key, known_keys(task))
    hint = f"did you mean {nearest}?" if nearest else "docs/recipes.md lists the valid keys"
    return f"{key}: unknown key; {hint}"


def describe_errors(error: ValidationError, kind: type[BaseModel]) -> list[str]:
    """One line for each key whose value is wrong, as `key: what is wrong with it`."""
    by_key: dict[str, list[str]] = {}
    for detail in error.errors():
        key = str(detail["loc"][0]) if detail["loc"] else "recipe"
        message = detail["msg"].removeprefix("Value error, ")
        if detail["type"] == "missing":
            message = "is required"
        elif not message.startswith("must be"):
            message = f"{message[0].lower()}{message[1:]}, got {_shorten(detail['input'])}"
        if message not in by_key.setdefault(key, []):
            by_key[key].append(message)
    return [f"{key}: {_with_choices(kind, key, ' or '.join(messages))}" for key, messages in by_key.items()]


def _with_choices(kind: type[BaseModel], key: str, message: str) -> str:
    """Add the nearest of a key's literal choices to a message about a wrong value."""
    field = kind.model_fields.get(key)
    choices = [choice for choice in get_args(field.annotation) if isinstance(choice, str)] if field else []
    value = message.rpartition("got ")[2].strip("'")
    nearest = find_nearest(value, choices)
    return f"{message}; did you mean {nearest}?" if nearest else message


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
