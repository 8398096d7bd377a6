"""The commands of docs/start_laptop.md, one after the other, with a tiny model in place of the one that it names."""

from __future__ import annotations

import csv
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from onecurve.launcher.facts.history import read_json
from tests.conftest import ROOT, to_flags
from tests.docs.test_commands import COMMANDS
from tools.launches import LaunchServer, build_environment

pytestmark = pytest.mark.slow

PAGE = "start_laptop.md"
# Every topology's command is run by test_commands.py.
MINE = [command for command in COMMANDS if command.page == PAGE and command.words[0] == "onecurve"]
LOCAL = [command.words[1:] for command in MINE if "--topology" not in command.words]


@pytest.fixture
def folder(tmp_path: Path, news: Path) -> Path:
    """A folder with what the page has when it is read so far: the project, and a file with a recipe for it."""
    for name in ("training", "build"):
        (tmp_path / name).symlink_to(ROOT / name)
    rows = [json.loads(line) for line in (news / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    with (tmp_path / "reviews.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["review", "stars"])
        writer.writerows([row["text"], row["label"]] for row in rows)
    text = (ROOT / "docs" / PAGE).read_text(encoding="utf-8")
    [block] = re.findall(r"^```yaml\n(# reviews.yaml\n.*?)^```", text, re.MULTILINE | re.DOTALL)
    (tmp_path / "reviews.yaml").write_text(block, encoding="utf-8")
    return tmp_path


def test_the_page_can_be_followed(
    folder: Path, recipe: dict[str, Any], tiny_model: Path, launch_server: LaunchServer
) -> None:
    small = {"model_name_or_path": str(tiny_model), "max_train_steps": 2, "max_length": 32}
    demo = {key: value for key, value in recipe.items() if key != "output_dir"}
    first = ["run", "training/recipes/demo.yaml", *to_flags({**demo, "max_train_steps": 2})]  # what `make demo` does
    for words in [first, *LOCAL]:
        changed = to_flags(small) if words[1] == "reviews.yaml" else []
        result = launch_server.run_script(["-m", "onecurve", *words, *changed], build_environment(), 300, folder)
        assert result.returncode == 0, f"{shlex.join(words)}\n{result.stdout}{result.stderr}"
    for run in ("demo", "reviews", "reviews_3e-5"):
        assert read_json(folder / "runs" / run / "status.json")["state"] == "finished"
    assert (folder / "runs" / "demo" / "report.html").is_file()
    with (folder / "predictions.csv").open(encoding="utf-8", newline="") as file:
        assert {"text", "label", "prediction", "score"} <= set(next(csv.reader(file)))
