"""Where a training begins: at the pretrained model, at a checkpoint, or not at all because it is done."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from onecurve.training.config import FREE_KEYS, ResolvedRecipe
from onecurve.training.data.preparation import DIGEST_PREFIX, PreparedData
from onecurve.training.errors import BadInput
from onecurve.training.parallel import strategy
from onecurve.training.parallel.states import load_moments
from onecurve.training.recovery.checkpoints import (
    find_checkpoint,
    find_fault,
    keep_aside,
    load_progress,
    mend,
    point_best,
)
from onecurve.training.recovery.milestones import Progress
from onecurve.training.run_directory import RunDirectory


@dataclass(frozen=True)
class Start:
    """Where a training begins.

    Attributes:
        checkpoint: folder to start from; None starts from the pretrained model.
        progress: where that checkpoint stood.
        is_finished: the training is done; nothing is left to do.
        message: a line for the user.
        damaged: checkpoints that were passed over.
    """

    checkpoint: Path | None
    progress: Progress
    is_finished: bool = False
    message: str | None = None
    damaged: tuple[Path, ...] = ()


def find_start(run: RunDirectory, resolved: ResolvedRecipe) -> Start:
    """Look at the run directory and the recipe's `resume`, and say where to begin. Writes nothing.

    Raises:
        BadInput: the folder can't be written to, holds a run of another recipe, or the named checkpoint is not whole.
    """
    run.check_writable()
    resume = resolved.recipe.resume
    named = None if resume in ("auto", "never") else Path(resume)
    if not run.config.exists():
        return Start(None, Progress()) if named is None else _open_named(named, resolved)
    if resume == "never":
        raise BadInput(
            f"output_dir {str(run.path)!r} holds a run already, and resume is never; choose another output_dir"
        )
    status = run.read_status() or {}
    is_finished = status.get("state") == "finished"
    _refuse_another_recipe(run, resolved, is_finished)
    if is_finished:
        message = f"{run.path} is finished: {run.describe_last_evaluation()}. Nothing to do."
        return Start(None, Progress(step=status.get("step", 0)), True, message)
    found, faults = find_checkpoint(run.checkpoints)
    if named is not None:
        _refuse_older(named, found, run)
    notes = [f"Not whole, kept aside: {checkpoint}: {fault}." for checkpoint, fault in faults.items()]
    if found is not None:
        start = _start_from(found)
    else:  # It had no time to write one: it begins where it began.
        start = Start(None, Progress()) if named is None else _open_named(named, resolved)
    notes += [start.message] if start.message else []
    return replace(start, message="\n".join(notes) or None, damaged=tuple(faults))


def agree_on_start(accelerator: Accelerator, start: Start, data: PreparedData) -> Start:
    """Begin where process 0 found that the run begins: the others may have looked while an old process still saved.

    Raises:
        BadInput: on all processes, where the data have changed since, or one can't see that checkpoint, as on file systems
            that are not shared.
    """
    start = strategy.ask_main_process(lambda: _with_same_data(start, data))
    is_here = start.checkpoint is None or start.checkpoint.is_dir()
    here = accelerator.gather(torch.tensor([is_here], device=accelerator.device)).tolist()
    if not all(here):
        raise BadInput(
            f"process {here.index(False)} does not see {start.checkpoint}; output_dir must be the same for all processes"
        )
    return start


def tidy(run: RunDirectory, start: Start) -> None:
    """Keep damaged checkpoints aside, and end what a killed process left half done.

    For rank 0 alone, once every process has restored its start: before, another one might still read them.
    """
    for checkpoint in start.damaged:
        keep_aside(checkpoint)
    mend(run.checkpoints)
    # A kill may have come between a checkpoint's name and the link to it. The best one may also be another run's.
    best_step = start.progress.best_step
    if best_step is not None and (best := run.checkpoints / f"step_{best_step:08d}").is_dir():
        point_best(run, best)


def _open_named(checkpoint: Path, resolved: ResolvedRecipe) -> Start:
    """The checkpoint that `resume` names, if it is whole and of the same recipe."""
    fault = find_fault(checkpoint) if checkpoint.is_dir() else "no such folder; resume is auto, never or a checkpoint"
    if fault is not None:
        raise BadInput(f"resume: {checkpoint}: {fault}")
    owner = RunDirectory(checkpoint.resolve().parent.parent)
    if owner.config.exists():
        _refuse_another_recipe(owner, resolved, is_finished=False)
    return _start_from(checkpoint)


def _start_from(checkpoint: Path) -> Start:
    progress = load_progress(checkpoint)
    return Start(checkpoint, progress, message=f"Going on from {checkpoint} (step {progress.step}).")


def _refuse_older(named: Path, newest: Path | None, run: RunDirectory) -> None:
    """Refuse to go back within a run: the newer checkpoints would be in the way of those that are written next."""
    is_of_this_run = named.resolve().parent == run.checkpoints.resolve()
    if is_of_this_run and (newest is None or named.resolve() != newest.resolve()):
        raise BadInput(
            f"resume: {named} is not the newest whole checkpoint of {str(run.path)!r}, "
            f"{'none' if newest is None else newest.name} is; choose another output_dir to train on from it, or move the "
            "newer ones away to go back"
        )


def _with_same_data(start: Start, data: PreparedData) -> Start:
    """Refuse data that have changed since the checkpoint was written: another curve. The next one will know them."""
    for name, split in (("train", data.train), ("validation", data.validation)):
        known = start.progress.data.get(name, split.digest)
        start.progress.data[name] = split.digest
        if known.startswith(DIGEST_PREFIX) and known != split.digest:
            raise BadInput(
                f"{split.origin}: the {name} data have changed (rows, labels or tokens) since {start.checkpoint} was written; "
                "put back what was there to go on, or choose another output_dir to begin anew"
            )
    return start


def _refuse_another_recipe(run: RunDirectory, resolved: ResolvedRecipe, is_finished: bool) -> None:
    differing = run.differing_keys(resolved, FREE_KEYS)
    if not differing:
        return
    advice = "choose another output_dir"
    if is_finished:
        advice += f", or train on from its result with --model_name_or_path {run.final} and a new output_dir"
    first = f"{str(run.path)!r} holds a run of another recipe; {advice}. Differing keys:"
    raise BadInput("\n  ".join([first, *differing]))


def restore(accelerator: Accelerator, model: torch.nn.Module, optimizer: Any, scheduler: Any, start: Start) -> None:
    """Put moments and schedule where the checkpoint stood; the weights were loaded before `prepare`."""
    if start.checkpoint is None:
        return
    load_moments(accelerator, model, optimizer, start.checkpoint, start.progress.optimizer_step)
    scheduler.load_state_dict(start.progress.scheduler)
    for group, learning_rate in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
        group["lr"] = learning_rate
