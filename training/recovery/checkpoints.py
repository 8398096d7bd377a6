"""Checkpoints and the final model: one format for every strategy, complete and verified or not there.

    checkpoints/step_00000050/
        model.safetensors        weights by parameter name
        optimizer.safetensors    AdamW's moments as "<parameter name>.exp_avg" and ".exp_avg_sq"
        progress.json            step, schedule, best metric so far
        manifest.json            size and sha256 of each of them; written last

Training waits while the state is copied to host memory, into buffers that are used again; a thread of rank 0 writes it
under a temporary name, syncs it to disk, reads it back, and renames it. No pickle is written or read. Random states need
no place here: they are a function of (seed, step, process).

The whole state passes through the host memory of process 0: 12 bytes a parameter in float32 (weight and two moments).
`check_room` refuses a model for which that is not there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import shutil
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file

from onecurve.training.errors import BadInput, Fault
from onecurve.training.parallel.states import NamedTensors, Tensors, count_updates, unwrap, whole_moments, whole_weights
from onecurve.training.parallel.strategy import ask_main_process
from onecurve.training.recovery.milestones import Progress
from onecurve.training.run_directory import RunDirectory

# Raised whenever an older version could not read what is written, or this one what older ones wrote.
_FORMAT = 1

CHECKPOINT_FILES = ("model.safetensors", "optimizer.safetensors", "progress.json")

_GIB = 2**30


@dataclass
class CheckpointWriter:
    """Writes the checkpoints of one run beside the training, and removes those that are over `save_total_limit`.

    Leaving it as a context waits for a write that is under way, whatever ended the training.
    """

    accelerator: Accelerator
    model: torch.nn.Module
    optimizer: Any
    scheduler: Any
    run: RunDirectory
    save_total_limit: int | None
    _weights: Tensors = field(default_factory=dict)
    _moments: Tensors = field(default_factory=dict)
    _thread: threading.Thread | None = None
    _problem: str | None = None

    def save(self, progress: Progress, is_best: bool = False) -> None:
        """Copy the state of all processes and let it be written as checkpoints/step_N; `best` will name it if it is.

        Returns when the copy is made: the training may go on and change its weights.

        Raises:
            Fault: on every process, when the checkpoint before this one could not be written.
        """
        self.wait()
        progress.scheduler = self.scheduler.state_dict()
        progress.optimizer_step = count_updates(self.optimizer)
        self._copy(whole_weights(self.accelerator, self.model), self._weights)
        self._copy(whole_moments(self.accelerator, self.model, self.optimizer), self._moments)
        if self.accelerator.is_main_process:
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
            target = self.run.checkpoints / f"step_{progress.step:08d}"
            arguments = (target, json.dumps(progress.to_dict()), progress.best_step, is_best)
            # Not a daemon: an interpreter that ends in order waits for it.
            self._thread = threading.Thread(target=self._write, args=arguments, name="checkpoint")
            self._thread.start()

    def has_failed(self) -> bool:
        """Whether this process knows of a checkpoint that could not be written."""
        return self._problem is not None

    def wait(self) -> None:
        """Return when the last checkpoint is complete under its name; all processes must call it.

        Raises:
            Fault: on every process, when rank 0 could not write it. What was there before is untouched.
        """
        self._join()
        _agree(self._problem)

    def describe_last(self) -> str:
        """The last good checkpoint in a sentence."""
        self._join()
        last, _ = find_checkpoint(self.run.checkpoints)
        return "There is no checkpoint yet" if last is None else f"The last good checkpoint is {last}"

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._join()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _copy(self, tensors: NamedTensors, buffers: Tensors) -> None:
        """Take part in gathering each tensor, and keep it on rank 0."""
        for name, tensor in tensors:
            if not self.accelerator.is_main_process:
                continue
            if name not in buffers:
                buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            buffers[name].copy_(tensor, non_blocking=True)

    def _write(self, target: Path, progress: str, best_step: int | None, is_best: bool) -> None:
        def fill(staging: Path) -> None:
            check_free_space(target, sum(map(_count_bytes, (self._weights, self._moments))))
            for name, tensors in (("model.safetensors", self._weights), ("optimizer.safetensors", self._moments)):
                _save_tensors(tensors, staging / name)
            (staging / "progress.json").write_text(progress, encoding="utf-8")
            write_manifest(staging)

        self._problem = _publish(target, fill)
        if self._problem is None:
            try:
                if is_best:
                    point_best(self.run, target)
                self._prune(best_step)
            except OSError as error:
                self._problem = f"{self.run.checkpoints} could not be put in order: {error}"

    def _prune(self, best_step: int | None) -> None:
        """Keep the newest checkpoints and the best one; older ones go only now that the newest is whole."""
        if self.save_total_limit is None:
            return
        for old in sorted(self.run.checkpoints.glob("step_*"))[: -self.save_total_limit]:
            if best_step is None or old.name != f"step_{best_step:08d}":
                # A kill in the middle leaves no half of it under a checkpoint's name.
                shutil.rmtree(old.rename(old.with_name(f".{old.name}.tmp")))

    def save_final(self, tokenizer: Any, model_card: str, target: Path) -> None:
        """Write final/ as save_pretrained does, and compare what comes back with what was trained.

        Raises:
            Fault: on every process: a checkpoint or final/ could not be written, or what was read back differs.
        """
        self.wait()
        self._moments.clear()  # Room for the model that is read back.
        self._copy(whole_weights(self.accelerator, self.model), self._weights)
        if self.accelerator.is_main_process and torch.accelerator.is_available():
            torch.accelerator.synchronize()
        inner = unwrap(self.model)

        def fill(staging: Path) -> None:
            check_free_space(target, _count_bytes(self._weights))
            inner.save_pretrained(staging, state_dict=dict(self._weights))
            tokenizer.save_pretrained(staging)
            (staging / "README.md").write_text(model_card, encoding="utf-8")
            dtype = next(iter(self._weights.values())).dtype
            again = type(inner).from_pretrained(staging, dtype=dtype).state_dict()
            for name, tensor in self._weights.items():
                if name not in again or not torch.equal(again[name], tensor):
                    raise Fault(f"{name} is not what was trained when read back")

        _agree(_publish(target, fill) if self.accelerator.is_main_process else None)


def _agree(problem: str | None) -> None:
    """Let all processes learn what rank 0 ran into."""
    agreed = ask_main_process(lambda: problem)
    if agreed is not None:
        raise Fault(agreed)


def _publish(target: Path, fill: Callable[[Path], None]) -> str | None:
    """Fill a staging folder and rename it to `target`; returns what went wrong, after which nothing of it is left."""
    staging, replaced = target.with_name(f".{target.name}.tmp"), target.with_name(f".{target.name}.replaced")
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        fill(staging)
        _sync(staging)
        if target.exists():
            shutil.rmtree(replaced, ignore_errors=True)  # A kill may have left one beside its successor.
            target.rename(replaced)
        staging.rename(target)
        _sync_folder(target.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except Exception as error:  # safetensors raises its own kind for a full disk.
        shutil.rmtree(staging, ignore_errors=True)
        return f"{str(target)!r} could not be written: {error}. What was saved before is whole: start it again to go on"
    return None


def point_best(run: RunDirectory, checkpoint: Path) -> None:
    """Let `best` name a checkpoint, in one step."""
    link = run.path / ".best.tmp"
    link.unlink(missing_ok=True)
    link.symlink_to(checkpoint.relative_to(run.path))
    link.replace(run.best)


def mend(folder: Path) -> None:
    """Finish or undo what a killed process left half done in a folder of checkpoints; only while no other one writes."""
    for staging in folder.glob(".step_*.tmp"):
        shutil.rmtree(staging)
    for replaced in folder.glob(".step_*.replaced"):
        target = folder / replaced.name[1:].removesuffix(".replaced")
        if target.exists():
            shutil.rmtree(replaced)
        else:
            replaced.rename(target)


def _save_tensors(tensors: Tensors, path: Path) -> None:
    """Write a safetensors file, and compare each tensor with what comes back, bit for bit."""
    save_file(tensors, path)
    _sync_file(path)
    with safe_open(path, "pt") as file:
        for name, tensor in tensors.items():
            if not torch.equal(_bits(file.get_tensor(name)), _bits(tensor)):
                raise Fault(f"{name} is not what was written when read back")


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten().view(torch.uint8)  # Compared as numbers, NaN would differ from itself.


def _sync(folder: Path) -> None:
    for path in folder.iterdir():
        _sync_file(path)
    _sync_folder(folder)


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_sync_folder = _sync_file


def write_manifest(folder: Path) -> None:
    """Record size and sha256 of every file of a checkpoint."""
    files = {path.name: _describe_file(path) for path in sorted(folder.iterdir()) if path.name != "manifest.json"}
    (folder / "manifest.json").write_text(json.dumps({"format": _FORMAT, "files": files}, indent=2), encoding="utf-8")


def _describe_file(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    digest = hashlib.sha256()
    if size:
        # In one piece: between pieces, this thread would wait its turn with the one that trains.
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            digest.update(content)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _count_bytes(tensors: Tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def check_free_space(target: Path, num_bytes: int) -> None:
    """Refuse to begin a write for which the disk has no room.

    Raises:
        Fault: the disk is too full.
    """
    free = _free_bytes(target)
    if free < num_bytes:
        raise Fault(f"it takes {num_bytes / _GIB:.3g} GiB, {free / _GIB:.3g} GiB are free on its disk; make room")


def _free_bytes(path: Path) -> int:
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _available_memory() -> int:
    """Bytes that this process may still take: of the machine, and of each control group (container, job) it is in."""
    available = int(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError, KeyError):  # Another system, or control groups of the first version.
        own, root = _own_group()
        groups = [own, *(group for group in own.parents if group.is_relative_to(root))]
        available = min(available, *map(_group_memory, groups))
    return available


def _own_group() -> tuple[Path, Path]:
    root = Path("/sys/fs/cgroup")
    return root / Path("/proc/self/cgroup").read_text(encoding="utf-8").partition("0::/")[2].strip(), root


def _group_memory(group: Path) -> int:
    """Bytes that a control group may still take; what it caches of files can be taken back."""
    if not (group / "memory.max").exists() or (limit := (group / "memory.max").read_text().strip()) == "max":
        return sys.maxsize
    used = int((group / "memory.current").read_text())
    kept = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    return max(0, int(limit) - used + int(kept["active_file"]) + int(kept["inactive_file"]))


def check_room(run: RunDirectory, state_bytes: int, weight_bytes: int, num_checkpoints: int) -> None:
    """Refuse, before the first step, a training whose checkpoints fit neither into host memory nor on the disk.

    Args:
        state_bytes: of one checkpoint: weights and moments.
        weight_bytes: of final/.
        num_checkpoints: how many will be there at once.

    Raises:
        BadInput: there is too little of one.
    """
    memory = _available_memory()
    if state_bytes > memory:
        raise BadInput(
            f"a checkpoint gathers {state_bytes / _GIB:.3g} GiB in the host memory of process 0, "
            f"{memory / _GIB:.3g} GiB are available: a smaller model, or a machine with more memory, is needed"
        )
    # What a killed process left half done is removed before the next checkpoint, or the next final/, is written.
    files = [path for name in ("step_*/*", ".step_*/*") for path in run.checkpoints.glob(name)]
    files += run.path.glob(f".{run.final.name}.tmp/*")
    here = sum(path.stat().st_size for path in files if path.is_file())
    needed, free = num_checkpoints * state_bytes + weight_bytes - here, _free_bytes(run.path)
    if needed > free:
        raise BadInput(
            f"output_dir {str(run.path)!r}: {num_checkpoints} checkpoints of {state_bytes / _GIB:.3g} GiB and the final "
            f"model need {needed / _GIB:.3g} GiB more, {free / _GIB:.3g} GiB are free there; lower save_total_limit, "
            "save less often (checkpointing_steps), or choose another output_dir"
        )


def find_fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None if every file is there, whole and unchanged.

    Raises:
        BadInput: another version wrote it, and nothing can be said.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if manifest["format"] != _FORMAT:
            raise BadInput(
                f"{folder} was written by another version of Onecurve (format {manifest['format']}, this one reads "
                f"{_FORMAT}): go on with that version, or choose another output_dir"
            )
        for name in CHECKPOINT_FILES:
            if name not in manifest["files"]:
                return f"manifest.json does not list {name}"
        for name, expected in manifest["files"].items():
            path = folder / name
            if not path.exists():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
            if _describe_file(path) != expected:
                return f"{name} is damaged: its checksum differs"
    except FileNotFoundError:
        return "manifest.json is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"manifest.json cannot be read: {error}"
    return None


def find_checkpoint(folder: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest whole checkpoint, and what is wrong with each newer one.

    One that a killed process had moved away, to replace it, counts.
    """
    faults: dict[Path, str] = {}
    candidates = [*folder.glob(".step_*.replaced"), *folder.glob("step_*")]
    for candidate in sorted(candidates, key=lambda path: path.name.strip("."), reverse=True):
        fault = find_fault(candidate)
        if fault is None:
            return candidate, faults
        faults[candidate] = fault
    return None, faults


def keep_aside(checkpoint: Path) -> None:
    """Give a checkpoint that is not whole another name: nothing is lost, and nothing is written over it."""
    number = 1
    while (aside := checkpoint.with_name(f"damaged_{checkpoint.name}_{number}")).exists():
        number += 1
    checkpoint.rename(aside)


def load_progress(checkpoint: Path) -> Progress:
    """Read where the training stood."""
    return Progress(**json.loads((checkpoint / "progress.json").read_text(encoding="utf-8")))
