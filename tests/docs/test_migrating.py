"""docs/migrating.md has every setting of theirs and only keys of ours: a new version of either shows here."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from onecurve.training.config import all_keys
from onecurve.training.recipe import Recipe
from onecurve.training.tasks import TASKS, find_task
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "migrating.md").read_text(encoding="utf-8")
RECIPES: list[type[Recipe]] = [find_task(name).recipe_class for name in TASKS]


@dataclass(frozen=True)
class Row:
    """One line of a table: what is theirs, what is ours."""

    table: str
    theirs: tuple[str, ...]
    ours: str


def read_rows() -> Iterator[Row]:
    table = ""
    for line in PAGE.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if len(cells) != 3:
            table = ""
        elif not table:
            table = cells[0].strip("`") or "defaults"
        elif set(cells[0]) != {"-"}:
            yield Row(table, tuple(re.findall(r"`([^`]+)`", cells[0])), cells[1] if table != "defaults" else cells[2])


ROWS = list(read_rows())


def read_fields(package: str, file: str, name: str) -> dict[str, Any]:
    """Fields of a dataclass with their defaults, from its source: importing it would take seconds."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        pytest.skip(f"{package} is not installed")
    tree = ast.parse((Path(found.origin).parent / file).read_text(encoding="utf-8"))
    [content] = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == name]
    fields: dict[str, Any] = {}
    for node in content.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            keywords = {each.arg: each.value for each in getattr(node.value, "keywords", [])}
            default = keywords.get("default", node.value)
            fields[node.target.id] = default.value if isinstance(default, ast.Constant) else None
    return {name: default for name, default in fields.items() if not name.startswith("_")}


CLASSES = {
    "TrainingArguments": ("transformers", "training_args.py"),
    "SFTConfig": ("trl", "trainer/sft_config.py"),
    "ModelConfig": ("trl", "trainer/model_config.py"),
    "ScriptArguments": ("trl", "scripts/utils.py"),
}


@pytest.mark.parametrize("name", CLASSES)
def test_every_setting_of_theirs_has_one_row(name: str) -> None:
    fields = set(read_fields(*CLASSES[name], name))
    named = [setting for row in ROWS if row.table == name for setting in row.theirs]
    if name == "SFTConfig":
        fields -= set(read_fields(*CLASSES["TrainingArguments"], "TrainingArguments"))
    assert sorted(named) == sorted(fields)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.table}: {', '.join(row.theirs)}")
def test_every_key_of_ours_exists(row: Row) -> None:
    if row.ours == "none":
        return
    [written] = re.findall(r"`([^`]+)`", row.ours)
    key, _, value = written.partition(": ")
    assert key in (*all_keys(), "eval_only")
    if value:
        recipes = [recipe for recipe in RECIPES if key in recipe.model_fields]
        model = {"model_name_or_path": "m", "train_file": "t", key: yaml.safe_load(value)}
        for recipe in recipes:
            assert getattr(recipe.model_validate(model, context={}), key) == model[key]


def test_the_tables_are_read() -> None:
    assert len(ROWS) > 150
    assert {row.table for row in ROWS} >= {*CLASSES, "defaults", "script", "complete_nlp_example.py"}


def test_other_words_in_backticks_are_keys_too() -> None:
    """Notes beside a row name keys; what looks like a key of ours and is none is a mistake."""
    notes = [line.split("|")[-2] for line in PAGE.splitlines() if line.startswith("| `") and line.count("|") == 4]
    words = {
        word.partition(": ")[0] for note in notes for word in re.findall(r"`([a-z]+(?:_[a-z]+)+(?:: [^`]+)?)`", note)
    }
    assert {word for word in words if not word.startswith("eval_")} - {*all_keys()} == set()


@pytest.mark.parametrize(
    ("table", "theirs", "ours"),
    re.findall(r"^\| `(\w+)` \| `(\w+: [^`]+)` \| `(\w+: [^`]+)` \|$", PAGE, re.MULTILINE),
)
def test_defaults_that_differ(table: str, theirs: str, ours: str) -> None:
    [(their_key, their_value)] = yaml.safe_load(theirs).items()
    assert read_fields(*CLASSES[table], table)[their_key] == their_value
    [(key, value)] = yaml.safe_load(ours).items()
    assert Recipe.model_fields[key].default == value
    assert value != their_value
