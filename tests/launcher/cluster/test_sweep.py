"""The commands of a job array's tasks; slurm/sweep.sh is run on a real Slurm in tests/slurm."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from onecurve.launcher.cluster.sweep import build_task, copy_sweep, list_runs, load_array_sweep
from onecurve.launcher.errors import UsageError
from onecurve.launcher.sweeps.sweep_file import load_sweep
from tests.conftest import ROOT
from tests.messages import naming


def write(path: Path, recipe: Path, **keys: Any) -> Path:
    content = {"recipe": str(recipe), "metric": "loss", **keys}
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


@pytest.fixture
def sweep(tmp_path: Path, recipe_file: Path) -> Path:
    parameters = {"learning_rate": [1e-5, 3e-5], "seed": [1, 2, 3]}
    return write(tmp_path / "sweep.yaml", recipe_file, strategy="grid", parameters=parameters)


def test_the_command_of_a_task(recipe_file: Path, sweep: Path, tmp_path: Path) -> None:
    words = build_task(
        ["--task", "4", f"--sweep={sweep}", "--max_length=8", "--topology", "multi_cpu", "--num_processes=2"]
    )
    assert words[:2] == ["bash", str(ROOT / "slurm" / "finetune.sh")]
    assert dict(word.split("=", 1) for word in words[2:]) == {
        "--config": str(recipe_file),
        "--topology": "multi_cpu",
        "--num_processes": "2",
        "--learning_rate": "3.0e-05",
        "--seed": "2",
        "--max_length": "8",
        "--output_dir": str(tmp_path / "run" / "run_04"),
    }


def test_a_task_of_a_random_search_draws_only_its_own(recipe_file: Path, tmp_path: Path) -> None:
    keys = {"strategy": "random", "num_trials": 3, "parameters": {"learning_rate": {"low": 1e-5, "high": 1e-3}}}
    path = write(tmp_path / "random.yaml", recipe_file, **keys)
    runs = list_runs(load_sweep(path), {})
    assert f"--learning_rate={runs[2]['learning_rate']}" in build_task(["--task=2", f"--sweep={path}"])


def test_a_task_leaves_the_recipes_of_others_to_them(recipe_file: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "s.yaml", recipe_file, strategy="grid", parameters={"learning_rate": [1.0, -1.0]})
    assert "--learning_rate=1.0" in build_task(["--task=0", f"--sweep={path}"])


def test_trials_that_are_chosen_one_by_one_are_no_array(recipe_file: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "s.yaml", recipe_file, strategy="tpe", num_trials=3, parameters={"seed": [1, 2]})
    with pytest.raises(UsageError, match=naming(str(path), "tpe", "random")):
        load_array_sweep(path)


def test_a_flag_that_the_sweep_would_hide_is_refused(sweep: Path) -> None:
    with pytest.raises(UsageError, match=naming("--seed", str(sweep))):
        build_task(["--task=0", f"--sweep={sweep}", "--seed", "9"])
    with pytest.raises(UsageError, match=naming("--eval_only")):
        build_task(["--task=0", f"--sweep={sweep}", "--eval_only"])


def test_an_edit_of_the_sweep_file_does_not_reach_a_copy(sweep: Path, recipe_file: Path, tmp_path: Path) -> None:
    copy = copy_sweep(sweep, tmp_path / "new" / "folder")
    write(sweep, recipe_file, runs=[{"seed": 5}])
    other = copy_sweep(sweep, tmp_path / "new" / "folder")
    assert (load_sweep(copy).num_trials, load_sweep(other).num_trials) == (6, 1)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=naming("output_dir", str(tmp_path / "file"))):
        copy_sweep(sweep, tmp_path / "file")


def test_a_task_that_is_not_there(sweep: Path) -> None:
    with pytest.raises(UsageError, match="--array 0-5"):
        build_task(["--task", "6", "--sweep", str(sweep)])
    with pytest.raises(UsageError, match="--sweep SWEEP"):
        build_task(["--task", "6"])


def test_words_reach_the_shell_whole(recipe_file: Path, tmp_path: Path) -> None:
    odd = "two\nlines $(touch pwned) 'é"
    path = write(tmp_path / "sweep.yaml", recipe_file, runs=[{"text_column": odd}])
    words = [sys.executable, "-m", "onecurve.launcher.cluster.sweep", "--task=0", "--sweep", str(path)]
    output = subprocess.run(words, capture_output=True, check=True, cwd=ROOT).stdout.decode()
    assert output.endswith("\0")
    assert f"--text_column={odd}" in output.split("\0")


def test_the_job_after_the_array_shows_the_results(sweep: Path) -> None:
    words = build_task(["--sweep", str(sweep), "--max_length", "8", "--num_processes", "2"])
    assert words == ["onecurve", "sweep", str(sweep), "--results", "--max_length=8"]
