"""docs/recipes.md is what docs/build_recipes.py writes."""

from __future__ import annotations

import runpy

from onecurve.training.recipe import Recipe
from onecurve.training.tasks import TASKS, find_task
from tests.conftest import ROOT

SCRIPT = runpy.run_path(str(ROOT / "docs" / "build_recipes.py"))


def test_page_is_up_to_date() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert page == SCRIPT["build_page"](), "run `python docs/build_recipes.py`"


def test_every_key_has_one_row_with_a_meaning() -> None:
    rows = [line for line in SCRIPT["build_page"]().splitlines() if line.startswith("| `")]
    of_tasks = [find_task(name).recipe_class.model_fields for name in TASKS]
    own = [key for fields in of_tasks for key in fields if key not in Recipe.model_fields]
    assert [row.split("`")[1] for row in rows] == [*Recipe.model_fields, *own]
    assert all(field.description for fields in of_tasks for field in fields.values())
