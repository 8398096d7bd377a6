"""`onecurve fetch RECIPE`: download model, tokenizer and data into the caches, for machines without a network."""

from __future__ import annotations

import typer

from onecurve.launcher.cli.options import DebugOption, RecipeArgument, parse_keys


def fetch(context: typer.Context, recipe: RecipeArgument, debug: DebugOption = False) -> int:
    """Download a recipe's model, tokenizer and data into the caches, for machines without a network."""
    from onecurve.launcher.launching.command import find_root
    from onecurve.launcher.launching.fetch import fetch_inputs

    return fetch_inputs(str(recipe), parse_keys(context), find_root())
