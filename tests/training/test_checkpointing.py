"""A checkpoint is whole and verified, or it is passed over; a write that fails leaves what was there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from training import checkpointing
from training.checkpointing import CheckpointWriter, find_checkpoint, find_fault, load_progress, write_manifest
from training.faults import Fault
from training.milestones import Progress
from training.run_directory import RunDirectory
from training.strategy import forget_state


def make_checkpoint(folder: Path, step: int = 5) -> Path:
    path = folder / f"step_{step:08d}"
    path.mkdir(parents=True)
    (path / "model.safetensors").write_bytes(bytes(range(256)) * 8)
    (path / "optimizer.safetensors").write_bytes(b"moments" * 100)
    (path / "progress.json").write_text(json.dumps(Progress(step).to_dict()))
    write_manifest(path)
    return path


# Verification --------------------------------------------------------------------------------------------------------


def test_a_whole_checkpoint_has_no_fault(tmp_path: Path) -> None:
    assert find_fault(make_checkpoint(tmp_path)) is None


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "progress.json"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    path = make_checkpoint(tmp_path)
    (path / name).unlink()
    assert find_fault(path) == f"{name} is missing"


@pytest.mark.parametrize(("keep", "found"), [(0, 0), (2047, 2047), (2048, 2049)])
def test_a_truncated_or_longer_file_is_named(tmp_path: Path, keep: int, found: int) -> None:
    path = make_checkpoint(tmp_path)
    content = (path / "model.safetensors").read_bytes()[:keep]
    (path / "model.safetensors").write_bytes(content if found == keep else content + b"x")
    assert find_fault(path) == f"model.safetensors has {found} bytes instead of 2048"


@pytest.mark.parametrize("position", [0, 1000, 2047])
def test_one_flipped_bit_is_found(tmp_path: Path, position: int) -> None:
    path = make_checkpoint(tmp_path)
    content = bytearray((path / "model.safetensors").read_bytes())
    content[position] ^= 1
    (path / "model.safetensors").write_bytes(content)
    assert find_fault(path) == "model.safetensors is damaged: its checksum differs"


def test_without_a_manifest_it_was_never_finished(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path)
    (path / "manifest.json").unlink()
    assert find_fault(path) == "manifest.json is missing"
    assert find_fault(tmp_path / "nowhere") == "manifest.json is missing"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b'{"files": 3}',
        b'{"files": {"model.safetensors": {}, "optimizer.safetensors": {}, "progress.json": {}}}',
        b"\xff",
    ],
)
def test_a_manifest_that_makes_no_sense_is_a_fault(tmp_path: Path, content: bytes) -> None:
    path = make_checkpoint(tmp_path)
    (path / "manifest.json").write_bytes(content)
    assert str(find_fault(path)).startswith("manifest.json cannot be read: ")


def test_a_manifest_without_the_weights_is_a_fault(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path)
    (path / "manifest.json").write_text('{"format": 1, "files": {}}')
    assert find_fault(path) is not None


# Choice --------------------------------------------------------------------------------------------------------------


def spoil(path: Path) -> None:
    (path / "manifest.json").unlink()


def cut_short(path: Path) -> None:
    (path / "model.safetensors").write_bytes(b"")


def test_the_newest_checkpoint_is_found(tmp_path: Path) -> None:
    for step in (5, 100, 20):
        make_checkpoint(tmp_path, step)
    assert find_checkpoint(tmp_path) == (tmp_path / "step_00000100", {})


@pytest.mark.parametrize("damage", [spoil, cut_short, shutil.rmtree])
def test_a_damaged_checkpoint_is_passed_over_for_an_older_one(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    older, newer = make_checkpoint(tmp_path, 5), make_checkpoint(tmp_path, 10)
    damage(newer)
    found, faults = find_checkpoint(tmp_path)
    assert found == older
    assert list(faults) == ([newer] if newer.exists() else [])


def test_where_none_is_whole_each_fault_is_told(tmp_path: Path) -> None:
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


# Writing -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[CheckpointWriter]:
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    model, optimizer = accelerator.prepare(plain, torch.optim.AdamW(plain.parameters(), lr=0.1))
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer.optimizer)
    model(torch.ones(2, 3)).square().sum().backward()
    optimizer.step()
    yield CheckpointWriter(accelerator, model, optimizer, scheduler, RunDirectory(tmp_path / "run"), 2)
    forget_state()


def save(writer: CheckpointWriter, progress: Progress, is_best: bool = False) -> None:
    """Save, and wait until it is written."""
    writer.save(progress, is_best)
    writer.wait()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_checkpoint_holds_weights_and_moments_by_name(writer: CheckpointWriter) -> None:
    save(writer, Progress(3))
    path = writer.run.checkpoints / "step_00000003"
    assert find_fault(path) is None
    assert names(path) == {"model.safetensors", "optimizer.safetensors", "progress.json", "manifest.json"}
    weights, moments = load_file(path / "model.safetensors"), load_file(path / "optimizer.safetensors")
    for name, parameter in writer.model.named_parameters():
        assert torch.equal(weights[name], parameter)
        state = writer.optimizer.optimizer.state[parameter]
        assert torch.equal(moments[f"{name}.exp_avg"], state["exp_avg"])
        assert torch.equal(moments[f"{name}.exp_avg_sq"], state["exp_avg_sq"])
    assert len(moments) == 2 * len(weights)
    progress = load_progress(path)
    assert (progress.step, progress.optimizer_step) == (3, 1.0)
    assert progress.scheduler["last_epoch"] == writer.scheduler.last_epoch


def test_old_checkpoints_go_and_the_best_one_stays(writer: CheckpointWriter) -> None:
    for step in (1, 2, 3, 4, 5):
        save(writer, Progress(step, best_step=2 if step >= 2 else None), is_best=step == 2)
    assert names(writer.run.checkpoints) == {"step_00000002", "step_00000004", "step_00000005"}
    assert writer.run.best.resolve().name == "step_00000002"
    assert not Path(writer.run.best.readlink()).is_absolute(), "the run directory may be moved"


def test_without_a_best_one_the_newest_stay(writer: CheckpointWriter) -> None:
    for step in (1, 2, 3, 4):
        save(writer, Progress(step))
    assert names(writer.run.checkpoints) == {"step_00000003", "step_00000004"}
    assert not writer.run.best.exists()


@pytest.mark.parametrize("function", ["save_file", "write_manifest", "_sync"])
def test_a_write_that_fails_leaves_the_last_checkpoint(
    writer: CheckpointWriter, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    save(writer, Progress(1))

    def fail(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpointing, function, fail)
    with pytest.raises(Fault, match=r"step_00000002' could not be written: .*No space left on device"):
        save(writer, Progress(2))
    assert names(writer.run.checkpoints) == {"step_00000001"}
    assert find_fault(writer.run.checkpoints / "step_00000001") is None


def test_what_a_killed_write_left_is_in_nobodys_way(writer: CheckpointWriter) -> None:
    (writer.run.checkpoints / ".step_00000001.tmp").mkdir(parents=True)
    (writer.run.checkpoints / ".step_00000001.tmp" / "model.safetensors").write_bytes(b"half")
    save(writer, Progress(1))
    assert names(writer.run.checkpoints) == {"step_00000001"}
    assert find_fault(writer.run.checkpoints / "step_00000001") is None
