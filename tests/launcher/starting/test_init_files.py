"""`onecurve init` on files of many shapes: taken for what they are, with recipes that `check` accepts."""

from __future__ import annotations

import json
import runpy
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from onecurve.launcher.errors import Undecided
from onecurve.launcher.starting.choice import Candidate
from onecurve.training.config import load_recipe
from tests.conftest import ROOT
from tests.launcher.starting.conftest import KINDS, Command
from tools.init_files import FILES, InitFile

SCRIPT = runpy.run_path(str(ROOT / "docs" / "build_init.py"))
PAGE = (ROOT / "docs" / "init.md").read_text(encoding="utf-8")

CLEAR = [file for file in FILES if file.task is not None]
UNCLEAR = [file for file in FILES if file.task is None]


def is_slow(file: InitFile) -> bool:
    """Whether a process of its own imports `datasets`, or torch to count a T5's parameters: that takes seconds."""
    return file.name == "saved" or file.task == "seq2seq_lm"


def parametrize(files: list[InitFile]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "file", [pytest.param(file, id=file.name, marks=pytest.mark.slow if is_slow(file) else ()) for file in files]
    )


@parametrize(CLEAR)
def test_a_file_is_taken_for_what_it_is(
    file: InitFile, build_model: Callable[[str], Path], command: Command, tmp_path: Path
) -> None:
    judged = SCRIPT["judge"](file, tmp_path)  # Without a model, unless it is what decides.
    assert isinstance(judged, Candidate), judged
    assert SCRIPT["write_row"](file, judged) in PAGE, "run `python docs/build_init.py`"
    model = build_model(KINDS.get(str(file.task), "encoder"))
    result = command("init", tmp_path / file.name, "--model", model, "--output", "recipe.yaml", "--json")
    assert result.exit_code == 0, result.stderr
    answer = json.loads(result.stdout)
    assert judged.task == answer["task"] == file.task
    assert answer["keys"] == {**answer["keys"], **file.keys}
    recipe = load_recipe("recipe.yaml").recipe
    assert {key: getattr(recipe, key) for key in file.keys} == {
        key: tuple(value) if isinstance(value, list) else value for key, value in file.keys.items()
    }
    checked = command("check", "recipe.yaml", "--json")
    assert (checked.exit_code, json.loads(checked.stdout)["findings"]) == (0, [])


@parametrize(UNCLEAR)
def test_a_file_that_does_not_say_is_refused_with_the_flags_that_decide(
    file: InitFile, command: Command, tmp_path: Path
) -> None:
    judged = SCRIPT["judge"](file, tmp_path)
    assert isinstance(judged, Undecided), judged
    assert SCRIPT["write_row"](file, judged) in PAGE, "run `python docs/build_init.py`"
    assert set(judged.tasks) == set(file.could_be)
    result = command("init", tmp_path / file.name, "--json")
    assert (result.exit_code, list(tmp_path.glob("*.yaml"))) == (2, [])
    problems = json.loads(result.stdout)["problems"]
    assert problems == judged.problems
    for number, problem in enumerate(problem for problem in problems if problem.startswith("--")):
        flags = shlex.split(problem.partition("   ")[0])
        decided = command("init", tmp_path / file.name, *flags, "--output", f"{number}.yaml")
        assert decided.exit_code == 0, decided.stderr
        recipe = load_recipe(f"{number}.yaml").recipe
        for key, value in zip(flags[::2], flags[1::2], strict=True):
            assert getattr(recipe, key.removeprefix("--")) == value


def test_the_page_has_a_row_for_each_file() -> None:
    names = [line.split("`")[1] for line in PAGE.splitlines() if line.startswith("| `") and line.count("|") == 4]
    assert names == [file.name for file in FILES]
    assert len(CLEAR) >= 20
