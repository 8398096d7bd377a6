"""A sweep file says what each task of an array trains; slurm/sweep.sh is run on a real Slurm in tests/slurm."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from onecurve.launcher.cluster.sweep import build_runs, build_task, copy_sweep, load_sweep
from onecurve.launcher.errors import UsageError
from onecurve.training.config import RecipeError, load_recipe
from onecurve.training.tasks.text_classification import TextClassificationRecipe
from tests.conftest import ROOT
from tests.messages import naming


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    path = tmp_path / "sweep.yaml"
    path.write_text("grid:\n  learning_rate: [1e-5, 3.0e-5]\n  seed: [1, 2, 3]\n", encoding="utf-8")
    return path


def test_a_grid_is_every_combination(sweep: Path) -> None:
    runs = load_sweep(sweep)
    assert len(runs) == 6
    assert runs[:2] == [{"learning_rate": "1e-5", "seed": "1"}, {"learning_rate": "1e-5", "seed": "2"}]


def test_a_list_of_runs_keeps_types(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    settings = {"class_weights": {"tech": 2.0}, "mixed_precision": False, "text_column": "a b", "max_train_steps": None}
    path.write_text(yaml.safe_dump({"runs": [settings, {"seed": 1}]}), encoding="utf-8")
    first = load_recipe(str(ROOT / "training/recipes/demo.yaml"), load_sweep(path)[0]).recipe
    assert isinstance(first, TextClassificationRecipe)
    assert first.class_weights == {"tech": 2.0}
    assert (first.mixed_precision, first.text_column, first.max_train_steps) == ("no", "a b", None)


@pytest.mark.parametrize(
    ("text", "needed"),
    [
        ("", ("grid", "runs")),
        ("grid: {seed: [1]}\nruns: [{seed: 1}]", ("grid", "runs")),
        ("grid: {seed: 1}", ("grid",)),
        ("grid: {seed: []}", ("grid",)),
        ("runs: []", ("runs",)),
        ("runs: [1]", ("runs",)),
        ("runs: [{sead: 1}]", ("sead", "seed")),
        ("grid: {output_dir: [a, b]}", ("output_dir",)),
        ("grid: {seed: [1}", ("YAML",)),
        ("grid: {seed: " + str(list(range(2000))) + ", max_length: " + str(list(range(2000))) + "}", ("4,000,000",)),
    ],
)
def test_what_is_wrong_with_the_file(tmp_path: Path, text: str, needed: tuple[str, ...]) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=naming(*needed)):
        load_sweep(path)


def test_a_value_that_no_recipe_takes_is_found_before(recipe_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text("grid: {learning_rate: [1.0, -1.0], seed: [x]}", encoding="utf-8")
    with pytest.raises(RecipeError) as error:
        build_runs(str(recipe_file), path, {})
    assert any(problem.startswith("run 1: learning_rate") for problem in error.value.problems)
    assert any(problem.startswith("run 0: seed") for problem in error.value.problems)


def test_the_command_of_a_task(recipe_file: Path, sweep: Path, tmp_path: Path) -> None:
    words = build_task(
        ["--task", "4", "--config", str(recipe_file), f"--sweep={sweep}", "--seed", "9", "--max_length=8"]
    )
    assert words[:2] == ["bash", str(ROOT / "slurm" / "finetune.sh")]
    assert dict(word.split("=", 1) for word in words[2:]) == {
        "--config": str(recipe_file),
        "--learning_rate": "3e-05",
        "--seed": "2",
        "--max_length": "8",
        "--output_dir": str(tmp_path / "run" / "run_04"),
    }


def test_what_is_no_key_of_the_recipe_is_passed_on(recipe_file: Path, sweep: Path) -> None:
    words = ["--task=0", "--config", str(recipe_file), f"--sweep={sweep}"]
    more = ["--topology", "multi_cpu", "--num_processes=2", "--eval_only"]
    assert {"--topology=multi_cpu", "--num_processes=2", "--eval_only=true"} <= set(build_task([*words, *more]))


def test_a_task_leaves_the_recipes_of_others_to_them(recipe_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text("grid: {learning_rate: [1.0, -1.0]}", encoding="utf-8")
    assert "--learning_rate=1.0" in build_task(["--task=0", "--config", str(recipe_file), f"--sweep={path}"])


def test_an_edit_of_the_sweep_file_does_not_reach_a_copy(sweep: Path, tmp_path: Path) -> None:
    copy, before = copy_sweep(sweep, tmp_path / "new" / "folder"), load_sweep(sweep)
    sweep.write_text("runs: [{seed: 5}]", encoding="utf-8")
    other = copy_sweep(sweep, tmp_path / "new" / "folder")
    assert (load_sweep(copy), load_sweep(other)) == (before, [{"seed": "5"}])
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=naming("output_dir", str(tmp_path / "file"))):
        copy_sweep(sweep, tmp_path / "file")


def test_a_task_that_is_not_there(recipe_file: Path, sweep: Path) -> None:
    with pytest.raises(UsageError, match="--array 0-5"):
        build_task(["--task", "6", "--config", str(recipe_file), "--sweep", str(sweep)])
    with pytest.raises(UsageError, match="--sweep SWEEP"):
        build_task(["--task", "6", "--config", str(recipe_file)])


def test_words_reach_the_shell_whole(recipe_file: Path, tmp_path: Path) -> None:
    odd = "two\nlines $(touch pwned) 'é"
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump({"runs": [{"text_column": odd}]}), encoding="utf-8")
    words = [
        sys.executable,
        "-m",
        "onecurve.launcher.cluster.sweep",
        "--task=0",
        "--config",
        str(recipe_file),
        "--sweep",
        str(path),
    ]
    output = subprocess.run(words, capture_output=True, check=True, cwd=ROOT).stdout.decode()
    assert output.endswith("\0")
    assert f"--text_column={odd}" in output.split("\0")


def test_only_runs_that_are_there_are_compared(
    recipe_file: Path, sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--config", str(recipe_file), "--sweep", str(sweep)]
    with pytest.raises(UsageError, match=naming("0 of 6")):
        build_task(arguments)
    there = [tmp_path / "run" / f"run_{number:02d}" for number in (0, 3)]
    for run in there:
        run.mkdir(parents=True)
        (run / "config.yaml").write_text("seed: 1\n", encoding="utf-8")
    capsys.readouterr()
    assert build_task(arguments) == ["onecurve", "compare", *map(str, there)]
    assert re.findall(r"run_(\d\d) ", capsys.readouterr().err) == ["01", "02", "04", "05"]
