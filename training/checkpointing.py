"""Checkpoints and the final model: one format for every strategy, complete and verified or not there.

    checkpoints/step_00000050/
        model.safetensors        weights by parameter name
        optimizer.safetensors    AdamW's moments as "<parameter name>.exp_avg" and ".exp_avg_sq"
        progress.json            step, schedule, best metric so far
        manifest.json            size and sha256 of each of them; written last

The folder is written under a temporary name, synced to disk and renamed. No pickle is written or read. Random states
need no place here: they are a function of (seed, step, process).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors.torch import save_file

from training.faults import Fault
from training.milestones import Progress
from training.run_directory import RunDirectory
from training.states import gather_moments, gather_weights

CHECKPOINT_FILES = ("model.safetensors", "optimizer.safetensors", "progress.json")


@dataclass(frozen=True)
class CheckpointWriter:
    """Writes the checkpoints of one run, and removes those that are over `save_total_limit`."""

    accelerator: Accelerator
    model: torch.nn.Module
    optimizer: Any
    scheduler: Any
    run: RunDirectory
    save_total_limit: int | None

    def save(self, progress: Progress, is_best: bool = False) -> None:
        """Write checkpoints/step_N, and let `best` name it if it is; returns when it is complete under its name.

        Raises:
            Fault: on every process, when rank 0 could not write it. What was there before is untouched.
        """
        progress.scheduler = self.scheduler.state_dict()
        weights = gather_weights(self.accelerator, self.model)
        moments, progress.optimizer_step = gather_moments(self.accelerator, self.model, self.optimizer)
        target = self.run.checkpoints / f"step_{progress.step:08d}"

        def write(staging: Path) -> None:
            save_file(weights, staging / "model.safetensors")
            save_file(moments, staging / "optimizer.safetensors")
            (staging / "progress.json").write_text(json.dumps(progress.to_dict()), encoding="utf-8")
            write_manifest(staging)

        _publish(self.accelerator, target, write)
        if self.accelerator.is_main_process:
            if is_best:
                self._point_best(target)
            self._prune(progress.best_step)

    def _point_best(self, checkpoint: Path) -> None:
        """Let `best` name a checkpoint, in one step."""
        link = self.run.path / ".best.tmp"
        link.unlink(missing_ok=True)
        link.symlink_to(checkpoint.relative_to(self.run.path))
        link.replace(self.run.best)

    def _prune(self, best_step: int | None) -> None:
        """Keep the newest checkpoints and the best one; older ones go only now that the newest is whole."""
        if self.save_total_limit is None:
            return
        for old in sorted(self.run.checkpoints.glob("step_*"))[: -self.save_total_limit]:
            if best_step is None or old.name != f"step_{best_step:08d}":
                shutil.rmtree(old)


def _publish(accelerator: Accelerator, target: Path, write: Callable[[Path], None]) -> None:
    """Let rank 0 fill a staging folder and rename it to `target`; all ranks learn whether that worked."""
    problem = None
    if accelerator.is_main_process:
        staging = target.with_name(f".{target.name}.tmp")
        try:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
            write(staging)
            _sync(staging)
            replaced = target.with_name(f".{target.name}.replaced")
            if target.exists():
                target.rename(replaced)
            staging.rename(target)
            _sync_folder(target.parent)
            shutil.rmtree(replaced, ignore_errors=True)
        except Exception as error:  # safetensors raises its own kind for a full disk.
            shutil.rmtree(staging, ignore_errors=True)
            problem = f"{str(target)!r} could not be written: {error}"
    agreed = [problem]
    broadcast_object_list(agreed)
    if agreed[0] is not None:
        raise Fault(agreed[0])


def _sync(folder: Path) -> None:
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_manifest(folder: Path) -> None:
    """Record size and sha256 of every file of a checkpoint."""
    files = {path.name: _describe_file(path) for path in sorted(folder.iterdir()) if path.name != "manifest.json"}
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "files": files}, indent=2), encoding="utf-8")


def _describe_file(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def find_fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None if every file is there, whole and unchanged."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
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


def find_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, and a line for each newer one that is not."""
    faults: list[str] = []
    for candidate in sorted(folder.glob("step_*"), reverse=True):
        fault = find_fault(candidate)
        if fault is None:
            return candidate, faults
        faults.append(f"{candidate}: {fault}")
    return None, faults


def load_progress(checkpoint: Path) -> Progress:
    """Read where the training stood."""
    return Progress(**json.loads((checkpoint / "progress.json").read_text(encoding="utf-8")))


def save_final(accelerator: Accelerator, model: torch.nn.Module, tokenizer: Any, model_card: str, target: Path) -> None:
    """Write final/ as save_pretrained does, and compare what comes back with what was trained.

    Raises:
        Fault: it could not be written, or what was read back differs.
    """
    weights = gather_weights(accelerator, model)

    def write(staging: Path) -> None:
        inner = accelerator.unwrap_model(model)
        inner.save_pretrained(staging, state_dict=dict(weights))
        tokenizer.save_pretrained(staging)
        (staging / "README.md").write_text(model_card, encoding="utf-8")
        again = type(inner).from_pretrained(staging, dtype=next(iter(weights.values())).dtype).state_dict()
        for name, tensor in weights.items():
            if name not in again or not torch.equal(again[name], tensor):
                raise Fault(f"{name} is not what was trained when read back")

    _publish(accelerator, target, write)
