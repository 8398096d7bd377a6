"""The launcher knows the keys and columns of a task outside the project without importing its file."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from onecurve.launcher.facts.recipes import find_columns, load_recipe
from onecurve.training.config import RecipeError
from tests.messages import naming
from tests.training.tasks.test_outside_task import VOWELS


@pytest.fixture
def flags(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "vowels.py").write_text(f"print('{{hello}}')\n{VOWELS}", encoding="utf-8")
    return {"task": f"{tmp_path / 'vowels.py'}:Vowels", "model_name_or_path": "m", "train_file": "t.csv"}


def test_an_outside_recipe_has_its_values_sources_and_columns(flags: dict[str, str]) -> None:
    sys.modules.pop("onecurve_task_vowels", None)  # Another test may have trained with it.
    resolved = load_recipe(None, {**flags, "text_column": "body", "seed": "7"})
    assert resolved.recipe.seed == 7
    assert find_columns(resolved.recipe) == {"text_column": ["body"]}
    assert (resolved.sources["text_column"], resolved.sources["vowels"]) == ("flag", "default")
    assert "onecurve_task_vowels" not in sys.modules


def test_its_problems_are_those_of_the_training(flags: dict[str, str]) -> None:
    with pytest.raises(RecipeError, match=naming("vowel", "vowels")):
        load_recipe(None, {**flags, "vowel": "a"})
