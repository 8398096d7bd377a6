"""A published folder is complete; a kill at any moment loses nothing and leaves nothing in the way."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from onecurve.training.recovery.checkpoint_writer import CheckpointWriter
from onecurve.training.recovery.checkpoints import find_checkpoint
from onecurve.training.recovery.publishing import clean_up, link_best, publish
from onecurve.training.run_directory import RunDirectory
from tests.conftest import Run
from tests.messages import names as names_all
from tests.training.recovery.conftest import make_checkpoint, names


def test_a_kill_while_a_replaced_folder_is_removed_does_no_harm(
    writer: CheckpointWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = writer.run.path / "final"  # Not among the checkpoints, which the next start puts in order.

    def fill(staging: Path) -> None:
        (staging / "README.md").write_text("what was trained")

    assert publish(target, fill) is None
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path, **options: None)
        assert publish(target, fill) is None
    assert names(writer.run.path) == {"final", ".final.replaced"}
    assert publish(target, fill) is None
    assert names(writer.run.path) == {"final"}


def test_a_kill_between_two_renames_loses_no_checkpoint(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 6)
    make_checkpoint(tmp_path, 7).rename(tmp_path / ".step_00000007.replaced")
    make_checkpoint(tmp_path, 8).rename(tmp_path / ".step_00000007.tmp")
    assert find_checkpoint(tmp_path) == (tmp_path / ".step_00000007.replaced", {})
    clean_up(tmp_path)
    assert names(tmp_path) == {"step_00000006", "step_00000007"}
    make_checkpoint(tmp_path / "other", 7).rename(tmp_path / ".step_00000007.replaced")
    clean_up(tmp_path)
    assert names(tmp_path) == {"step_00000006", "step_00000007", "other"}


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o027])
def test_all_files_of_a_run_follow_the_umask(
    recipe: dict[str, Any], train: Callable[[Mapping[str, Any]], Run], tmp_path: Path, umask: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("ONECURVE_CACHE", str(tmp_path / "cache"))
    before = os.umask(umask)
    try:
        run = train({**recipe, "max_train_steps": 2, "checkpointing_steps": 1})
        (tmp_path / "mine").touch()
    finally:
        os.umask(before)
    assert run.exit_code == 0, run.stderr
    files = [path for folder in (run.path, tmp_path / "cache") for path in folder.rglob("*")]
    assert {"model.safetensors", "optimizer.safetensors", "tokenizer.json"} <= {path.name for path in files}
    wrong = {
        str(path): oct(stat.S_IMODE(path.stat().st_mode))
        for path in files
        if stat.S_IMODE(path.stat().st_mode) != (0o777 if path.is_dir() else 0o666) & ~umask
    }
    assert wrong == {}


def test_a_copy_of_the_best_checkpoint_becomes_the_link_again(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    checkpoint = make_checkpoint(run.checkpoints, 5)
    shutil.copytree(checkpoint, run.best)
    (tmp_path / ".best.tmp").symlink_to("checkpoints")  # Of a start that failed here.
    line = link_best(run, checkpoint)
    assert names_all(line, str(run.best), "link")
    assert names(tmp_path) == {"checkpoints", "best"}
    assert run.best.readlink() == Path("checkpoints/step_00000005")
    assert link_best(run, checkpoint) is None


def test_a_folder_of_the_users_own_is_set_aside(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    checkpoint = make_checkpoint(run.checkpoints, 5)
    (run.best / "mine").mkdir(parents=True)
    line = link_best(run, checkpoint)
    assert names_all(line, "best_1")
    assert (tmp_path / "best_1" / "mine").is_dir()
    assert run.best.is_symlink()


def test_a_run_that_was_copied_with_its_links_followed_resumes(
    recipe: dict[str, Any], train: Callable[[Mapping[str, Any]], Run], tmp_path: Path
) -> None:
    recipe |= {"metric_for_best_model": "loss", "eval_steps": 2, "checkpointing_steps": 2}
    whole = train(recipe)
    assert whole.exit_code == 0, whole.stderr
    copy = shutil.copytree(whole.path, tmp_path / "copy", symlinks=False)
    assert not (copy / "best").is_symlink()
    (copy / "status.json").unlink()
    shutil.rmtree(copy / "checkpoints" / "step_00000008")
    resumed = train({**recipe, "output_dir": str(copy)})
    assert resumed.exit_code == 0, resumed.stderr
    assert names_all(resumed.stdout, str(copy / "best"), "link")
    assert (copy / "best").resolve().parent == copy / "checkpoints"
    assert (copy / "final" / "model.safetensors").read_bytes() == (
        whole.path / "final" / "model.safetensors"
    ).read_bytes()
