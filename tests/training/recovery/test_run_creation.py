"""The run directory at the start of a training."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from onecurve.training.config import known_keys, load_recipe
from onecurve.training.errors import BadInput
from onecurve.training.record.environment import describe_environment
from onecurve.training.recovery import run_lock
from onecurve.training.recovery.run_creation import check_writable, create_run
from onecurve.training.recovery.run_lock import RunLock
from onecurve.training.run_directory import RunDirectory
from onecurve.training.tasks.text_classification import TextClassification
from tests.messages import naming
from tests.training.conftest import make_run, resolve


def test_create_writes_the_recipe_and_the_environment(tmp_path: Path) -> None:
    resolved = resolve(tmp_path / "a" / "run", seed="7")
    run = RunDirectory.of(resolved.recipe)
    with RunLock(run) as lock:
        create_run(run, lock, resolved, describe_environment({"num_processes": 2}, ["loss"]))
    assert {path.name for path in run.path.iterdir()} == {".lock", "config.yaml", "environment.json"}
    assert load_recipe(str(run.config)).recipe == resolved.recipe
    environment = json.loads(run.environment.read_text())
    assert environment["topology"] == {"num_processes": 2}


def test_the_recipe_in_a_run_directory_names_every_key_that_its_task_reads(tmp_path: Path) -> None:
    make_run(tmp_path)
    written = (tmp_path / "config.yaml").read_text()
    assert all(f"\n{key}: " in written for key in known_keys(TextClassification))


def test_each_start_is_counted(tmp_path: Path) -> None:
    resolved = resolve(tmp_path)
    for number in (1, 2, 3):
        run = RunDirectory.of(resolved.recipe)
        with RunLock(run) as lock:
            create_run(run, lock, resolved, {})
        assert json.loads((tmp_path / "environment.json").read_text())["num_starts"] == number


def test_each_starts_environment_is_kept(tmp_path: Path) -> None:
    resolved = resolve(tmp_path)
    run = RunDirectory.of(resolved.recipe)
    for version in ("2.12", "2.13", "2.14"):
        with RunLock(run) as lock:
            create_run(run, lock, resolved, {"packages": {"torch": version}})
    kept = [json.loads(path.read_text()) for path in sorted((tmp_path / "environments").iterdir())]
    kept.append(json.loads(run.environment.read_text()))
    assert [(each["num_starts"], each["packages"]["torch"]) for each in kept] == [(1, "2.12"), (2, "2.13"), (3, "2.14")]


def test_a_folder_that_can_hold_a_run_is_accepted(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "new", tmp_path / "new" / "below"):
        check_writable(RunDirectory(path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("below", ["", "run", "run/deeper"])
def test_a_file_is_no_run_directory(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(BadInput, match=naming("output_dir", str(tmp_path / "file"))):
        check_writable(RunDirectory(tmp_path / "file" / below))


def test_a_folder_that_may_not_be_written_to_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Root may write anywhere, so the system's answer is given for it.
    asked: list[Path] = []

    def refuse(path: Path, mode: int) -> bool:
        asked.append(path)
        return not mode & os.W_OK

    monkeypatch.setattr(os, "access", refuse)
    with pytest.raises(BadInput, match=naming("output_dir", "writable")):
        check_writable(RunDirectory(tmp_path / "new" / "run"))
    assert asked == [tmp_path], "the nearest folder that exists is asked"


def test_of_two_trainings_that_start_together_the_second_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "_TIMEOUT_SECONDS", 0.2)
    resolved = resolve(tmp_path / "run")
    first, second = RunDirectory.of(resolved.recipe), RunDirectory.of(resolved.recipe)
    with RunLock(first) as first_lock, RunLock(second) as second_lock:  # Neither finds a folder yet.
        create_run(first, first_lock, resolved, {})
        with pytest.raises(BadInput, match=naming(str(tmp_path / "run"))):
            create_run(second, second_lock, resolved, {})


def test_a_run_that_started_and_ended_meanwhile_is_not_started_again(tmp_path: Path) -> None:
    resolved = resolve(tmp_path / "run")
    first, second = RunDirectory.of(resolved.recipe), RunDirectory.of(resolved.recipe)
    with RunLock(second) as second_lock:  # Finds no folder yet.
        with RunLock(first) as first_lock:
            create_run(first, first_lock, resolved, {})
        before = first.environment.read_bytes()
        with pytest.raises(BadInput, match=naming(str(tmp_path / "run"))):
            create_run(second, second_lock, resolved, {})
    assert first.environment.read_bytes() == before
