"""In which keys a recipe differs from the one that a run directory was started with."""

from __future__ import annotations

from collections.abc import Callable

from onecurve.training.config import Recipe, RecipeError, ResolvedRecipe, load_recipe
from onecurve.training.errors import BadInput
from onecurve.training.run_directory import RunDirectory


def find_differing_keys(
    run: RunDirectory,
    recipe: Recipe,
    ignored: frozenset[str],
    load: Callable[[str], ResolvedRecipe] = load_recipe,
) -> list[str]:
    """Keys, except `ignored` ones, in which the run's recipe differs from `recipe`, as "key: old -> new".

    Args:
        load: reads a recipe; the launcher has a way of its own.

    Raises:
        BadInput: the run's config.yaml is not a valid recipe.
    """
    try:
        old = load(str(run.config)).recipe.model_dump()
    except RecipeError as error:
        raise BadInput(f"output_dir {str(run.path)!r} holds a run whose config.yaml is not valid: {error}") from None
    new = recipe.model_dump()
    if recipe.dropout == 0 and recipe.lora_dropout == 0:
        ignored = ignored | {"dropout_masks"}  # There are none.
    return [
        f"{key}: {old.get(key)!r} -> {new.get(key)!r}"
        for key in dict.fromkeys((*old, *new))
        if key not in ignored and old.get(key) != new.get(key)
    ]
