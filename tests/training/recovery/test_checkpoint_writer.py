"""Checkpoints are written while the training goes on; a write that fails leaves the earlier ones."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from onecurve.training.errors import Fault
from onecurve.training.parallel.states import count_state_bytes
from onecurve.training.recovery import checkpoint_writer, parts, publishing
from onecurve.training.recovery.checkpoint_writer import CheckpointWriter
from onecurve.training.recovery.checkpoints import find_checkpoint, load_progress
from onecurve.training.recovery.manifest import find_fault
from onecurve.training.recovery.milestones import Progress
from onecurve.training.recovery.publishing import clean_up
from onecurve.training.recovery.resumption import Start, restore, tidy
from onecurve.training.run_directory import MOMENTS_FILE, WEIGHTS_FILE, RunDirectory
from tests.messages import naming
from tests.training.recovery.conftest import names, save


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


def test_a_checkpoint_holds_the_loss_scale_of_fp16(writer: CheckpointWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Accelerator, "mixed_precision", "fp16")
    writer.accelerator.scaler = torch.amp.GradScaler(device="cpu", init_scale=2.0**9)
    save(writer, Progress(3))
    checkpoint = writer.run.checkpoints / "step_00000003"
    writer.accelerator.scaler = torch.amp.GradScaler(device="cpu")
    start = Start(checkpoint, load_progress(checkpoint))
    restore(writer.accelerator, writer.model, writer.optimizer, writer.scheduler, start)
    assert writer.accelerator.scaler.state_dict()["scale"] == 2.0**9


def test_the_bytes_of_a_state_are_those_of_its_files(writer: CheckpointWriter) -> None:
    save(writer, Progress(1))
    files = (writer.run.checkpoints / "step_00000001").glob("*.safetensors")
    assert count_state_bytes(writer.model) == sum(
        tensor.nbytes for path in files for tensor in load_file(path).values()
    )


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


def test_a_kill_while_an_old_one_is_removed_leaves_no_half_of_it(
    writer: CheckpointWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        save(writer, Progress(step))
    remove, removed = shutil.rmtree, []

    def stop_half_way(path: Path, **options: Any) -> None:
        if Path(path).exists():
            removed.append(Path(path))
            (Path(path) / "manifest.json").unlink()
        else:
            remove(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", stop_half_way)
        save(writer, Progress(3))
    assert len(removed) == 1
    assert find_checkpoint(writer.run.checkpoints) == (writer.run.checkpoints / "step_00000003", {})
    assert {path.name for path in writer.run.checkpoints.glob("step_*")} == {"step_00000002", "step_00000003"}
    clean_up(writer.run.checkpoints)
    assert names(writer.run.checkpoints) == {"step_00000002", "step_00000003"}


def test_a_kill_before_the_link_to_the_best_one_is_repaired(
    writer: CheckpointWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(writer, Progress(1, best_step=1), is_best=True)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_writer, "link_best", lambda run, checkpoint: None)
        save(writer, Progress(2, best_step=2), is_best=True)
    assert writer.run.best.resolve().name == "step_00000001"
    newest = writer.run.checkpoints / "step_00000002"
    tidy(writer.run, Start(newest, load_progress(newest)))
    assert writer.run.best.resolve() == newest


def test_the_final_model_needs_no_memory_for_moments(writer: CheckpointWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    save(writer, Progress(1))
    held: list[int] = []

    def note(*arguments: Any) -> None:
        held.append(len(writer._copy.tensors(MOMENTS_FILE)))

    monkeypatch.setattr(checkpoint_writer, "write_final", note)
    writer.save_final(None, "", writer.run.final)
    assert held == [0]


@pytest.mark.parametrize("function", ["save_file", "write_manifest", "sync"])
def test_a_write_that_fails_leaves_the_last_checkpoint(
    writer: CheckpointWriter, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    save(writer, Progress(1))

    def fail(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    module = {"save_file": parts, "write_manifest": checkpoint_writer, "sync": publishing}[function]
    monkeypatch.setattr(module, function, fail)
    with pytest.raises(Fault, match=naming("step_00000002'", "No space left on device")):
        save(writer, Progress(2))
    assert names(writer.run.checkpoints) == {"step_00000001"}
    assert find_fault(writer.run.checkpoints / "step_00000001") is None


def test_what_a_killed_write_left_is_replaced(writer: CheckpointWriter) -> None:
    (writer.run.checkpoints / ".step_00000001.tmp").mkdir(parents=True)
    (writer.run.checkpoints / ".step_00000001.tmp" / "model.safetensors").write_bytes(b"half")
    save(writer, Progress(1))
    assert names(writer.run.checkpoints) == {"step_00000001"}
    assert find_fault(writer.run.checkpoints / "step_00000001") is None


def test_training_goes_on_while_a_checkpoint_is_written(
    writer: CheckpointWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_write = threading.Event()
    write = save_file

    def hold(*arguments: Any) -> None:
        assert may_write.wait(10)
        write(*arguments)

    monkeypatch.setattr(parts, "save_file", hold)
    before = {name: parameter.detach().clone() for name, parameter in writer.model.named_parameters()}
    writer.save(Progress(1))
    with torch.no_grad():
        for parameter in writer.model.parameters():
            parameter.add_(1.0)
    assert not (writer.run.checkpoints / "step_00000001").exists()
    may_write.set()
    writer.wait()
    saved = load_file(writer.run.checkpoints / "step_00000001" / "model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in before.items()), "as they were when it was saved"


def test_a_copy_uses_the_same_memory_again(writer: CheckpointWriter) -> None:
    def find_places() -> dict[str, int]:
        copies = (writer._copy.tensors(file) for file in (WEIGHTS_FILE, MOMENTS_FILE))
        return {name: tensor.data_ptr() for copy in copies for name, tensor in copy.items()}

    save(writer, Progress(1))
    places = find_places()
    save(writer, Progress(2))
    assert len(places) == 12
    assert find_places() == places


def test_a_failed_write_is_known_before_the_next_one(writer: CheckpointWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(parts, "save_file", fail)
        writer.save(Progress(1))
        writer._join()
    assert writer.has_failed()
    with pytest.raises(Fault, match=naming("step_00000001'")):
        writer.save(Progress(2))


def test_what_the_disk_gives_back_is_compared_with_what_was_saved(
    writer: CheckpointWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = save_file

    def spoil_one(tensors: Any, path: Path, *others: Any) -> None:
        write({name: tensor + (name == "0.bias") for name, tensor in tensors.items()}, path, *others)

    monkeypatch.setattr(parts, "save_file", spoil_one)
    with pytest.raises(Fault, match=naming("0.bias")):
        save(writer, Progress(1))
    assert names(writer.run.checkpoints) == set()


def test_a_disk_that_is_full_in_the_middle_of_a_write_leaves_the_last_checkpoint(
    writer: CheckpointWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], check=False).returncode != 0:
        pytest.skip("mounting a small file system needs root")
    try:
        writer.run = RunDirectory(small / "run")
        save(writer, Progress(1))
        with (small / "filler").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(small).free)
        # As if another program had filled the disk after the look at its free space.
        monkeypatch.setattr(checkpoint_writer, "check_free_space", lambda target, num_bytes: None)
        with pytest.raises(Fault, match=naming("step_00000002'", "no space left on device")):
            save(writer, Progress(2))
        assert names(writer.run.checkpoints) == {"step_00000001"}
        assert find_fault(writer.run.checkpoints / "step_00000001") is None
    finally:
        subprocess.run(["umount", "--lazy", str(small)], check=True)
