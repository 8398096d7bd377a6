"""The run directory: where things lie, what may be written where, and what a run remembers of itself."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from onecurve.training.config import ResolvedRecipe, load_recipe
from onecurve.training.errors import BadInput
from onecurve.training.recipe_comparison import find_differing_keys
from onecurve.training.record.environment import describe_environment
from onecurve.training.recovery import run_lock
from onecurve.training.recovery.resumption import describe_last_evaluation
from onecurve.training.recovery.run_creation import check_writable, create_run
from onecurve.training.recovery.run_lock import RunLock
from onecurve.training.run_directory import RunDirectory
from onecurve.training.tasks.text_classification import TextClassificationRecipe
from tests.conftest import ROOT
from tests.messages import names, naming


def resolve(folder: Path, **flags: str) -> ResolvedRecipe:
    return load_recipe(None, {"model_name_or_path": "m", "train_file": "t.csv", "output_dir": str(folder), **flags})


def test_every_path_lies_in_the_output_dir(tmp_path: Path) -> None:
    run = RunDirectory.of(resolve(tmp_path / "run").recipe)
    names = [name for name, value in vars(RunDirectory).items() if isinstance(value, property)]
    paths = [getattr(run, name) for name in names]
    assert {path.parent for path in paths} == {tmp_path / "run"}
    assert len(set(paths)) == len(paths)
    assert not (tmp_path / "run").exists(), "asking for a path makes nothing"


def test_create_writes_the_recipe_and_the_environment(tmp_path: Path) -> None:
    resolved = resolve(tmp_path / "a" / "run", seed="7")
    run = RunDirectory.of(resolved.recipe)
    with RunLock(run) as lock:
        create_run(run, lock, resolved, describe_environment({"num_processes": 2}, ["loss"]))
    assert {path.name for path in run.path.iterdir()} == {".lock", "config.yaml", "environment.json"}
    assert load_recipe(str(run.config)).recipe == resolved.recipe
    environment = json.loads(run.environment.read_text())
    assert environment["topology"] == {"num_processes": 2}


def test_the_environment_names_versions_and_revision_and_no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "a-secret-value")
    environment = describe_environment({}, ["loss"])
    assert environment["packages"]["torch"] == torch.__version__
    assert environment["packages"]["safetensors"] != "not installed"
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert environment["git_revision"] == (head.stdout.strip() if head.returncode == 0 else None)
    assert "a-secret-value" not in json.dumps(environment)


def test_a_task_of_an_array_is_named_by_its_array(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    assert describe_environment({}, ["loss"])["slurm_job_id"] == "12"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert describe_environment({}, ["loss"])["slurm_job_id"] == "12_3", (
        "the number of the last task is that of the array"
    )


def test_without_git_there_is_no_revision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert describe_environment({}, ["loss"])["git_revision"] is None


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


@pytest.mark.parametrize("content", [None, "", "{", "[1]", "7", "null"])
def test_a_status_that_says_nothing_is_none(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "status.json").write_text(content)
    assert RunDirectory(tmp_path).read_status() is None


def test_a_status_is_read_back(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text('{"state": "finished", "step": 3}')
    assert RunDirectory(tmp_path).read_status() == {"state": "finished", "step": 3}


def test_the_last_evaluation_is_told_in_a_line(tmp_path: Path) -> None:
    lines = [
        {"event": "eval", "step": 5, "eval_loss": 1.0, "eval_accuracy": 0.5, "eval_f1_macro": 0.1},
        {"event": "eval", "step": 10, "eval_loss": 0.25, "eval_accuracy": 0.9, "eval_f1_macro": 0.2},
        {"event": "train", "step": 11, "loss": 0.3},
    ]
    run = RunDirectory(tmp_path)
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert names(describe_last_evaluation(run), "step 10", "eval_loss 0.2500", "eval_accuracy 0.9000")
    run.metrics.write_text(json.dumps(lines[2]) + "\n")
    assert describe_last_evaluation(run) == "not evaluated"


def test_differing_keys_are_named_with_both_values(tmp_path: Path) -> None:
    here = resolve(tmp_path)
    run = RunDirectory.of(here.recipe)
    with RunLock(run) as lock:
        create_run(run, lock, here, {})
    other = resolve(tmp_path, seed="7", learning_rate="0.1", report_to="wandb")
    assert find_differing_keys(run, here.recipe, frozenset()) == []
    assert find_differing_keys(run, other.recipe, frozenset({"report_to"})) == [
        "learning_rate: 5e-05 -> 0.1",
        "seed: 42 -> 7",
    ]
    assert "report_to: 'none' -> 'wandb'" in find_differing_keys(run, other.recipe, frozenset())


def test_a_config_that_was_spoilt_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: -1\n")
    with pytest.raises(BadInput, match=naming("config.yaml", "seed")):
        find_differing_keys(RunDirectory(tmp_path), resolve(tmp_path).recipe, frozenset())


def test_the_recipe_in_a_run_directory_names_every_key(tmp_path: Path) -> None:
    make_run(tmp_path)
    written = (tmp_path / "config.yaml").read_text()
    assert all(f"\n{key}: " in written for key in TextClassificationRecipe.model_fields)


# The lock ------------------------------------------------------------------------------------------------------------


def make_run(folder: Path) -> RunDirectory:
    """A run directory that a training has been in."""
    resolved = resolve(folder)
    run = RunDirectory.of(resolved.recipe)
    with RunLock(run) as lock:
        create_run(run, lock, resolved, {})
    return run


def test_a_folder_is_kept_for_one_training_until_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "_TIMEOUT_SECONDS", 0.2)
    before = {path: path.stat().st_mtime_ns for path in make_run(tmp_path).path.iterdir()}
    with RunLock(RunDirectory(tmp_path)), pytest.raises(BadInput, match=naming(str(tmp_path))):
        RunLock(RunDirectory(tmp_path)).acquire()
    with RunLock(RunDirectory(tmp_path)):
        assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before, "it writes nothing"


def test_where_no_training_has_been_a_look_leaves_no_file(tmp_path: Path) -> None:
    with RunLock(RunDirectory(tmp_path)):
        assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path)

    def refuse(descriptor: int, flags: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with RunLock(RunDirectory(tmp_path)):
        assert "No locks available" in capsys.readouterr().out


def test_only_process_0_takes_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunLock(make_run(tmp_path)):
        monkeypatch.setenv("RANK", "1")
        RunLock(RunDirectory(tmp_path)).acquire()


def test_of_two_that_begin_at_once_the_second_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "_TIMEOUT_SECONDS", 0.2)
    resolved = resolve(tmp_path / "run")
    first, second = RunDirectory.of(resolved.recipe), RunDirectory.of(resolved.recipe)
    with RunLock(first) as first_lock, RunLock(second) as second_lock:  # Neither finds a folder yet.
        create_run(first, first_lock, resolved, {})
        with pytest.raises(BadInput, match=naming(str(tmp_path / "run"))):
            create_run(second, second_lock, resolved, {})


def test_what_began_and_ended_while_another_was_loading_is_not_begun_anew(tmp_path: Path) -> None:
    resolved = resolve(tmp_path / "run")
    first, second = RunDirectory.of(resolved.recipe), RunDirectory.of(resolved.recipe)
    with RunLock(second) as second_lock:  # Finds no folder yet.
        with RunLock(first) as first_lock:
            create_run(first, first_lock, resolved, {})
        before = first.environment.read_bytes()
        with pytest.raises(BadInput, match=naming(str(tmp_path / "run"))):
            create_run(second, second_lock, resolved, {})
    assert first.environment.read_bytes() == before


def test_each_start_is_counted(tmp_path: Path) -> None:
    resolved = resolve(tmp_path)
    for number in (1, 2, 3):
        run = RunDirectory.of(resolved.recipe)
        with RunLock(run) as lock:
            create_run(run, lock, resolved, {})
        assert json.loads((tmp_path / "environment.json").read_text())["num_starts"] == number
