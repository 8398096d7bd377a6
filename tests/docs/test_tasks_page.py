"""docs/tasks.md has a row for each task, and the recipes of the tasks' pages are recipes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from onecurve.training.config import load_recipe
from onecurve.training.tasks import TASKS
from tests.conftest import ROOT

_YAML_BLOCK = re.compile(r"^```yaml\n(task: .*?)^```", re.MULTILINE | re.DOTALL)

PAGES = [path for name in TASKS if (path := ROOT / "docs" / f"{name}.md").exists()]


def test_each_task_has_a_row_and_a_page() -> None:
    rows = [
        line for line in (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8").splitlines() if line.startswith("| ")
    ]
    for name in TASKS:
        [row] = [row for row in rows if f"| `{name}` |" in row and row.count("|") == 5]
        assert f"({name}.md)" in row or f"#task-{name}" in row


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_recipes_of_a_page_are_valid(page: Path, tmp_path: Path) -> None:
    blocks = _YAML_BLOCK.findall(page.read_text(encoding="utf-8"))
    assert blocks, "a page begins with an example"
    for number, block in enumerate(blocks):
        (tmp_path / f"{number}.yaml").write_text(block, encoding="utf-8")
        recipe = load_recipe(str(tmp_path / f"{number}.yaml")).recipe
        assert recipe.task == page.stem
        assert set(yaml.safe_load(block)) <= set(type(recipe).model_fields)
