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
from accelerate.utils import DistributedType, broadcast_object_list
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from training.config import MEMORY_KEYS, ResolvedRecipe
from training.faults import BadInput, Fault
from training.milestones import Progress
from training.run_directory import RunDirectory

MOMENTS = ("exp_avg", "exp_avg_sq")

Tensors = dict[str, torch.Tensor]


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
            if target.exists():
                shutil.rmtree(target)
            staging.rename(target)
            _sync_folder(target.parent)
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


@dataclass(frozen=True)
class Start:
    """Where a training begins.

    Attributes:
        checkpoint: folder to start from; None starts from the pretrained model.
        progress: where that checkpoint stood.
        is_finished: the training is done; nothing is left to do.
        message: a line for the user.
    """

    checkpoint: Path | None
    progress: Progress
    is_finished: bool = False
    message: str | None = None


def find_start(run: RunDirectory, resolved: ResolvedRecipe) -> Start:
    """Look at the run directory and the recipe's `resume`, and say where to begin. Writes nothing.

    Raises:
        BadInput: the folder can't be written to, holds a run of another recipe, or the named checkpoint is not whole.
    """
    run.check_writable()
    resume = resolved.recipe.resume
    if resume not in ("auto", "never"):
        checkpoint = Path(resume)
        fault = (
            find_fault(checkpoint) if checkpoint.is_dir() else "no such folder; resume is auto, never or a checkpoint"
        )
        if fault is not None:
            raise BadInput(f"resume: {resume}: {fault}")
        return Start(checkpoint, load_progress(checkpoint), message=f"Going on from {checkpoint}.")
    if not run.config.exists():
        return Start(None, Progress())
    if resume == "never":
        raise BadInput(
            f"output_dir {str(run.path)!r} holds a run already, and resume is never; choose another output_dir"
        )
    differing = run.differing_keys(resolved, MEMORY_KEYS)
    status = run.read_status() or {}
    is_finished = status.get("state") == "finished"
    if differing:
        advice = "choose another output_dir"
        if is_finished:
            advice += f", or train on from its result with --model_name_or_path {run.final} and a new output_dir"
        raise BadInput(
            "\n  ".join(
                [f"output_dir {str(run.path)!r} holds a run of another recipe; {advice}. Differing keys:", *differing]
            )
        )
    if is_finished:
        return Start(
            None, Progress(), True, f"{run.path} is finished: {run.describe_last_evaluation()}. Nothing to do."
        )
    found, faults = find_checkpoint(run.checkpoints)
    notes = [f"Passed over, not whole: {fault}." for fault in faults]
    if found is None:
        return Start(None, Progress(), message="\n".join(notes) or None)
    progress = load_progress(found)
    return Start(found, progress, message="\n".join([*notes, f"Going on from {found} (step {progress.step})."]))


def load_progress(checkpoint: Path) -> Progress:
    """Read where the training stood."""
    return Progress(**json.loads((checkpoint / "progress.json").read_text(encoding="utf-8")))


def restore(accelerator: Accelerator, model: torch.nn.Module, optimizer: Any, scheduler: Any, start: Start) -> None:
    """Put moments and schedule where the checkpoint stood; the weights were loaded before `prepare`."""
    if start.checkpoint is None:
        return
    load_moments(accelerator, model, optimizer, start.checkpoint)
    scheduler.load_state_dict(start.progress.scheduler)
    for group, learning_rate in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
        group["lr"] = learning_rate


# States by parameter name, under every strategy ------------------------------------------------------------------------


def gather_weights(accelerator: Accelerator, model: torch.nn.Module) -> Tensors:
    """Whole float32 weights by name, on the host; complete on rank 0, empty or complete on the others."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        from deepspeed.utils import safe_get_full_fp32_param

        weights = {}
        for name, parameter in model.module.named_parameters():  # type: ignore[union-attr]
            whole = safe_get_full_fp32_param(parameter)
            weights[name] = (parameter.detach() if whole is None else whole).cpu().clone()
        weights.update({name: buffer.cpu().clone() for name, buffer in _saved_buffers(accelerator, model).items()})
        return weights
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    whole_weights: dict[str, Any] = get_model_state_dict(model, options=options)
    return _own(whole_weights)


def _saved_buffers(accelerator: Accelerator, model: torch.nn.Module) -> Tensors:
    inner = accelerator.unwrap_model(model)
    parameters = dict(inner.named_parameters())
    return {name: value for name, value in inner.state_dict().items() if name not in parameters}


def gather_moments(accelerator: Accelerator, model: torch.nn.Module, optimizer: Any) -> tuple[Tensors, float]:
    """AdamW's whole moments as "<name>.exp_avg" and the number of its updates; complete on rank 0."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        from deepspeed.utils import safe_get_full_optimizer_state

        _link_states(optimizer)
        moments = {}
        for name, parameter in model.module.named_parameters():  # type: ignore[union-attr]
            for key in MOMENTS:
                whole = safe_get_full_optimizer_state(parameter, key)
                if whole is not None:
                    moments[f"{name}.{key}"] = whole.float().cpu().clone()
        return moments, _read_optimizer_step(_torch_optimizer(optimizer))
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    states: dict[str, Any] = get_optimizer_state_dict(model, _torch_optimizer(optimizer), options=options)
    moments = {
        f"{name}.{key}": value[key]
        for name, value in states.get("state", {}).items()
        for key in MOMENTS
        if key in value
    }
    return _own(moments), _read_optimizer_step(_torch_optimizer(optimizer))


def _link_states(optimizer: Any) -> None:
    """Let DeepSpeed's getters and setters find the moments of every parameter group.

    ZeRO-1 and 2 link them once, after the first group has stepped and before the others have a state (0.19.8).
    """
    engine_optimizer = optimizer.optimizer
    if hasattr(engine_optimizer, "_hp_optimizer_states_linked"):
        engine_optimizer._hp_optimizer_states_linked = False
        engine_optimizer._lazy_init_hp_params_optimizer_state()


def _own(tensors: Tensors) -> Tensors:
    """Contiguous copies on the host: safetensors refuses tensors that share memory."""
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def _torch_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The AdamW inside accelerate's and DeepSpeed's wrappers."""
    while not isinstance(optimizer, torch.optim.AdamW) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    assert isinstance(optimizer, torch.optim.Optimizer)
    return optimizer


def _read_optimizer_step(optimizer: torch.optim.Optimizer) -> float:
    for state in optimizer.state.values():
        if "step" in state:
            return float(state["step"])
    return 0.0


def load_moments(accelerator: Accelerator, model: torch.nn.Module, optimizer: Any, checkpoint: Path) -> None:
    """Put a checkpoint's moments into a prepared optimizer, under any strategy and number of processes."""
    moments = load_file(checkpoint / "optimizer.safetensors")
    step = load_progress(checkpoint).optimizer_step
    if not moments:
        return
    inner = _torch_optimizer(optimizer)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        _load_moments_deepspeed(model, optimizer, moments, step)
        return
    names = sorted({name.rpartition(".")[0] for name in moments})
    state: Any = {
        name: {"step": torch.tensor(step), **{key: moments[f"{name}.{key}"] for key in MOMENTS}} for name in names
    }
    groups = get_optimizer_state_dict(model, inner, options=StateDictOptions(full_state_dict=True))["param_groups"]
    set_optimizer_state_dict(
        model,
        inner,
        optim_state_dict={"state": state, "param_groups": groups},
        options=StateDictOptions(full_state_dict=True),
    )


def _load_moments_deepspeed(model: torch.nn.Module, optimizer: Any, moments: Tensors, step: float) -> None:
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    engine_optimizer, inner = optimizer.optimizer, _torch_optimizer(optimizer)
    # AdamW makes its state at its first step; the engine's setters need it to be there. Its keys are the flat float32
    # partitions, which have another name in each stage.
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        for flat in getattr(engine_optimizer, name, ()):
            state = {key: torch.zeros_like(flat) for key in MOMENTS}
            inner.state[flat] = {
                "step": torch.tensor(step) if isinstance(inner, torch.optim.AdamW) else int(step),
                **state,
            }
    _link_states(optimizer)
    for name, parameter in model.module.named_parameters():  # type: ignore[union-attr]
        for key in MOMENTS:
            if f"{name}.{key}" not in moments:
                continue
            whole = moments[f"{name}.{key}"].to(parameter.device)
            if hasattr(parameter, "ds_tensor"):  # ZeRO-3; its setter of whole tensors fails where the parts are padded.
                size, rank = parameter.ds_tensor.numel(), torch.distributed.get_rank()
                padded = torch.nn.functional.pad(whole.flatten(), (0, size * torch.distributed.get_world_size()))
                safe_set_local_optimizer_state(parameter, padded.narrow(0, size * rank, size), key)
            else:
                safe_set_full_optimizer_state(parameter, whole, key)


# The final model -------------------------------------------------------------------------------------------------------


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
        again = type(inner).from_pretrained(staging, dtype=torch.float32).state_dict()
        for name, tensor in weights.items():
            if name not in again or not torch.equal(again[name], tensor):
                raise Fault(f"{name} is not what was trained when read back")

    _publish(accelerator, target, write)
