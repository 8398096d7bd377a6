"""In which keys a recipe differs from the one that a run directory was started with."""

from __future__ import annotations

from onecurve.training.config import Recipe, RecipeError, load_recipe
from onecurve.training.errors import BadInput
from onecurve.training.run_directory import RunDirectory


def find_differing_keys(run: RunDirectory, recipe: Recipe, ignored: frozenset[str]) -> list[str]:
    """Keys, except `ignored` ones, in which the run's recipe differs from `recipe`, as "key: old -> new".

    Raises:
        BadInput: the run's config.yaml is not a valid recipe.
    """
    try:
        old = load_recipe(str(run.config)).recipe
    except RecipeError as error:
        raise BadInput(f"output_dir {str(run.path)!r} holds a run whose config.yaml is not valid: {error}") from None
    return [
        f"{key}: {getattr(old, key)!r} -> {getattr(recipe, key)!r}"
        for key in type(old).model_fields
        if key not in ignored and getattr(old, key) != getattr(recipe, key)
    ]
