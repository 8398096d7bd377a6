"""A published folder is complete; a kill at any moment loses nothing and leaves nothing in the way."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from onecurve.training.recovery.checkpoint_writer import CheckpointWriter
from onecurve.training.recovery.checkpoints import find_checkpoint
from onecurve.training.recovery.publishing import clean_up, publish
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
