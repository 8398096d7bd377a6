"""docs/recipes.md is what docs/build_recipes.py writes."""

from __future__ import annotations

import runpy

from onecurve.training.tasks.text_classification import TextClassificationRecipe
from tests.conftest import ROOT

SCRIPT = runpy.run_path(str(ROOT / "docs" / "build_recipes.py"))


def test_page_is_up_to_date() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert page == SCRIPT["build_page"](), "run `python docs/build_recipes.py`"


def test_every_key_has_one_row_with_a_meaning() -> None:
    rows = [line for line in SCRIPT["build_page"]().splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == list(TextClassificationRecipe.model_fields)
    assert all(field.description for field in TextClassificationRecipe.model_fields.values())
