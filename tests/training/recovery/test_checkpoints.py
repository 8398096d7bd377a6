"""The newest intact checkpoint is found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from onecurve.training.errors import BadInput
from onecurve.training.recovery.checkpoints import find_checkpoint, load_progress, set_aside
from onecurve.training.recovery.milestones import Progress
from tests.messages import naming
from tests.training.recovery.conftest import make_checkpoint, names


def test_a_checkpoint_of_another_version_is_refused(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 5)
    path = make_checkpoint(tmp_path, 10)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "format": 4}))
    with pytest.raises(BadInput, match=naming("step_00000010", "format 4", "3")):
        find_checkpoint(tmp_path)


def spoil(path: Path) -> None:
    (path / "manifest.json").unlink()


def cut_short(path: Path) -> None:
    (path / "model.safetensors").write_bytes(b"")


def test_the_newest_checkpoint_is_found(tmp_path: Path) -> None:
    for step in (5, 100, 20):
        make_checkpoint(tmp_path, step)
    assert find_checkpoint(tmp_path) == (tmp_path / "step_00000100", {})


@pytest.mark.parametrize("damage", [spoil, cut_short, shutil.rmtree])
def test_an_older_checkpoint_replaces_a_corrupt_one(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    older, newer = make_checkpoint(tmp_path, 5), make_checkpoint(tmp_path, 10)
    damage(newer)
    found, faults = find_checkpoint(tmp_path)
    assert found == older
    assert list(faults) == ([newer] if newer.exists() else [])


@pytest.mark.parametrize(("rank", "notices"), [("0", True), ("1", False)])
def test_only_rank_0_reads_whole_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: str, notices: bool
) -> None:
    """A thousand ranks would read the same terabyte, and start where rank 0 does anyway."""
    path = make_checkpoint(tmp_path, 10) / "model.safetensors"
    path.write_bytes(bytes(each ^ 1 for each in path.read_bytes()))
    monkeypatch.setenv("RANK", rank)
    found, faults = find_checkpoint(tmp_path)
    assert (found is None, len(faults)) == (notices, notices)


def test_if_none_is_intact_each_fault_is_returned(tmp_path: Path) -> None:
    for step in (5, 10):
        spoil(make_checkpoint(tmp_path, step))
    found, faults = find_checkpoint(tmp_path)
    assert found is None
    assert [path.name for path in faults] == ["step_00000010", "step_00000005"]
    assert find_checkpoint(tmp_path / "nowhere") == (None, {})


def test_a_staging_folder_is_no_checkpoint(tmp_path: Path) -> None:
    shutil.move(make_checkpoint(tmp_path, 10), tmp_path / ".step_00000010.tmp")
    assert find_checkpoint(tmp_path) == (None, {})


def test_progress_comes_back_as_it_was(tmp_path: Path) -> None:
    progress = Progress(7, {"last_epoch": 7, "_last_lr": [0.1, 1 / 3]}, 6.0, 0.1 + 0.2, 4, 1)
    (tmp_path / "progress.json").write_text(json.dumps(progress.to_dict()))
    assert load_progress(tmp_path) == progress


def test_a_corrupt_checkpoint_is_set_aside(tmp_path: Path) -> None:
    for _ in range(2):
        set_aside(make_checkpoint(tmp_path, 7))
    assert names(tmp_path) == {"corrupt_step_00000007_1", "corrupt_step_00000007_2"}
    assert find_checkpoint(tmp_path) == (None, {})
