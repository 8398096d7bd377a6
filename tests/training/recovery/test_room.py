"""Checkpoints that do not fit into memory or on the disk are refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from onecurve.training.errors import BadInput
from onecurve.training.recovery.room import check_room
from onecurve.training.run_directory import RunDirectory
from tests.messages import naming
from tests.training.recovery.conftest import make_checkpoint


def test_a_state_larger_than_the_host_memory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"9\.31e\+05 GiB"):
        check_room(RunDirectory(tmp_path), 10**15, 10**14, 1, 10**15)


def test_checkpoints_larger_than_the_disk_are_refused(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(BadInput, match=naming("3 checkpoints", "1 GiB")):
        check_room(RunDirectory(tmp_path / "new" / "run"), 2**30, free, 3, 2**30)
    check_room(RunDirectory(tmp_path / "new" / "run"), 2**10, 2**10, 3, 2**10)


def test_checkpoints_that_are_there_already_need_no_more_room(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    make_checkpoint(run.checkpoints)
    free = shutil.disk_usage(tmp_path).free
    size = sum(path.stat().st_size for path in run.checkpoints.glob("*/*"))
    check_room(run, 1, free - (1 << 20) + size, 1, 1)


@pytest.mark.parametrize("name", ["checkpoints/.step_00000005.tmp", ".final.tmp"])
def test_what_a_killed_save_left_is_counted_as_room(tmp_path: Path, name: str) -> None:
    run = RunDirectory(tmp_path)
    make_checkpoint(run.checkpoints).rename(tmp_path / name)
    with (tmp_path / name / "model.safetensors").open("wb") as file:
        file.truncate(1 << 30)  # A hole: the disk stays as free as it was.
    free = shutil.disk_usage(tmp_path).free
    check_room(run, 1, free + (1 << 29), 1, 1)
