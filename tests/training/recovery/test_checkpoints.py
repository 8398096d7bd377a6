"""A checkpoint is whole and verified, or it is passed over; a write that fails leaves what was there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from onecurve.training.errors import BadInput, Fault
from onecurve.training.parallel.accelerator import forget_state
from onecurve.training.parallel.states import count_state_bytes
from onecurve.training.recovery import checkpoint_writer, host_memory, publishing
from onecurve.training.recovery.checkpoint_writer import CheckpointWriter
from onecurve.training.recovery.checkpoints import find_checkpoint, load_progress, set_aside
from onecurve.training.recovery.manifest import find_fault, write_manifest
from onecurve.training.recovery.milestones import Progress
from onecurve.training.recovery.publishing import clean_up, publish
from onecurve.training.recovery.resumption import Start, tidy
from onecurve.training.recovery.room import check_room
from onecurve.training.run_directory import RunDirectory
from tests import messages
from tests.messages import naming


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
    assert messages.names(find_fault(path), name)


@pytest.mark.parametrize(("keep", "found"), [(0, 0), (2047, 2047), (2048, 2049)])
def test_a_truncated_or_longer_file_is_named(tmp_path: Path, keep: int, found: int) -> None:
    path = make_checkpoint(tmp_path)
    content = (path / "model.safetensors").read_bytes()[:keep]
    (path / "model.safetensors").write_bytes(content if found == keep else content + b"x")
    assert messages.names(find_fault(path), "model.safetensors", f"{found} bytes", "2048")


@pytest.mark.parametrize("position", [0, 1000, 2047])
def test_one_flipped_bit_is_found(tmp_path: Path, position: int) -> None:
    path = make_checkpoint(tmp_path)
    content = bytearray((path / "model.safetensors").read_bytes())
    content[position] ^= 1
    (path / "model.safetensors").write_bytes(content)
    assert messages.names(find_fault(path), "model.safetensors", "checksum")


def test_without_a_manifest_it_was_never_finished(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path)
    (path / "manifest.json").unlink()
    assert messages.names(find_fault(path), "manifest.json")
    assert messages.names(find_fault(tmp_path / "nowhere"), "manifest.json")


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
    assert messages.names(find_fault(path), "manifest.json")


def test_a_manifest_without_the_weights_is_a_fault(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path)
    (path / "manifest.json").write_text('{"format": 1, "files": {}}')
    assert find_fault(path) is not None


def test_a_checkpoint_of_another_version_is_refused_and_not_passed_over(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 5)
    path = make_checkpoint(tmp_path, 10)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "format": 2}))
    with pytest.raises(BadInput, match=naming("step_00000010", "format 2", "1")):
        find_checkpoint(tmp_path)


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


def test_a_kill_before_the_link_to_the_best_one_is_made_good(
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

    def note(target: Path, fill: Any) -> None:
        held.append(len(writer._moments.tensors))

    monkeypatch.setattr(checkpoint_writer, "publish", note)
    writer.save_final(None, "", writer.run.final)
    assert held == [0]


def test_without_a_best_one_the_newest_stay(writer: CheckpointWriter) -> None:
    for step in (1, 2, 3, 4):
        save(writer, Progress(step))
    assert names(writer.run.checkpoints) == {"step_00000003", "step_00000004"}
    assert not writer.run.best.exists()


@pytest.mark.parametrize("function", ["save_file", "write_manifest", "sync"])
def test_a_write_that_fails_leaves_the_last_checkpoint(
    writer: CheckpointWriter, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    save(writer, Progress(1))

    def fail(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(publishing if function == "sync" else checkpoint_writer, function, fail)
    with pytest.raises(Fault, match=naming("step_00000002'", "No space left on device")):
        save(writer, Progress(2))
    assert names(writer.run.checkpoints) == {"step_00000001"}
    assert find_fault(writer.run.checkpoints / "step_00000001") is None


def test_what_a_killed_write_left_is_in_nobodys_way(writer: CheckpointWriter) -> None:
    (writer.run.checkpoints / ".step_00000001.tmp").mkdir(parents=True)
    (writer.run.checkpoints / ".step_00000001.tmp" / "model.safetensors").write_bytes(b"half")
    save(writer, Progress(1))
    assert names(writer.run.checkpoints) == {"step_00000001"}
    assert find_fault(writer.run.checkpoints / "step_00000001") is None


def test_a_kill_while_a_replaced_folder_is_removed_is_in_nobodys_way(
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


def test_training_goes_on_while_a_checkpoint_is_written(
    writer: CheckpointWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_write = threading.Event()
    write = save_file

    def hold(*arguments: Any) -> None:
        assert may_write.wait(10)
        write(*arguments)

    monkeypatch.setattr(checkpoint_writer, "save_file", hold)
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
    save(writer, Progress(1))
    places = {
        name: tensor.data_ptr() for name, tensor in {**writer._weights.tensors, **writer._moments.tensors}.items()
    }
    save(writer, Progress(2))
    assert {
        name: tensor.data_ptr() for name, tensor in {**writer._weights.tensors, **writer._moments.tensors}.items()
    } == places


def test_a_failed_write_is_known_before_the_next_one(writer: CheckpointWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_writer, "save_file", fail)
        writer.save(Progress(1))
        writer._join()
    assert writer.has_failed()
    with pytest.raises(Fault, match=naming("step_00000001'")):
        writer.save(Progress(2))


def test_what_the_disk_gives_back_is_compared_with_what_was_saved(
    writer: CheckpointWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = save_file

    def spoil_one(tensors: Any, path: Path) -> None:
        write({name: tensor + (name == "0.bias") for name, tensor in tensors.items()}, path)

    monkeypatch.setattr(checkpoint_writer, "save_file", spoil_one)
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


# Room ----------------------------------------------------------------------------------------------------------------


def test_a_state_larger_than_the_host_memory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"9\.31e\+05 GiB"):
        check_room(RunDirectory(tmp_path), 10**15, 10**14, 1)


def test_checkpoints_larger_than_the_disk_are_refused(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(BadInput, match=naming("3 checkpoints", "1 GiB")):
        check_room(RunDirectory(tmp_path / "new" / "run"), 2**30, free, 3)
    check_room(RunDirectory(tmp_path / "new" / "run"), 2**10, 2**10, 3)


def test_checkpoints_that_are_there_already_need_no_more_room(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    make_checkpoint(run.checkpoints)
    free = shutil.disk_usage(tmp_path).free
    size = sum(path.stat().st_size for path in run.checkpoints.glob("*/*"))
    check_room(run, 1, free - (1 << 20) + size, 1)


@pytest.mark.parametrize("name", ["checkpoints/.step_00000005.tmp", ".final.tmp"])
def test_what_a_killed_save_left_is_counted_as_room(tmp_path: Path, name: str) -> None:
    run = RunDirectory(tmp_path)
    make_checkpoint(run.checkpoints).rename(tmp_path / name)
    with (tmp_path / name / "model.safetensors").open("wb") as file:
        file.truncate(1 << 30)  # A hole: the disk stays as free as it was.
    free = shutil.disk_usage(tmp_path).free
    check_room(run, 1, free + (1 << 29), 1)


def test_memory_is_what_the_machine_and_each_control_group_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = tmp_path / "job" / "step"
    group.mkdir(parents=True)
    assert host_memory._measure_group(group) == sys.maxsize
    for folder, limit in ((group, "max"), (group.parent, "1000000")):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text("400000\n")
        (folder / "memory.stat").write_text("anon 300000\nactive_file 20000\ninactive_file 30000\n")
    assert host_memory._measure_group(group) == sys.maxsize
    assert host_memory._measure_group(group.parent) == 650_000
    monkeypatch.setattr(host_memory, "_find_own_group", lambda: (group, tmp_path))
    assert host_memory.measure_available_memory() == 650_000


def test_the_bytes_of_a_state_are_those_of_its_files(writer: CheckpointWriter) -> None:
    save(writer, Progress(1))
    files = (writer.run.checkpoints / "step_00000001").glob("*.safetensors")
    assert count_state_bytes(writer.model) == sum(
        tensor.nbytes for path in files for tensor in load_file(path).values()
    )


# Order ---------------------------------------------------------------------------------------------------------------


def test_a_damaged_checkpoint_is_kept_aside(tmp_path: Path) -> None:
    for _ in range(2):
        set_aside(make_checkpoint(tmp_path, 7))
    assert names(tmp_path) == {"corrupt_step_00000007_1", "corrupt_step_00000007_2"}
    assert find_checkpoint(tmp_path) == (None, {})


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
