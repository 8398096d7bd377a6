"""Where a training starts: from the pretrained model, from a checkpoint, or not at all because it is finished."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from onecurve.training.config import FREE_KEYS, ResolvedRecipe
from onecurve.training.data.preparation import DIGEST_PREFIX, PreparedData
from onecurve.training.errors import BadInput, Fault
from onecurve.training.models.adapters import has_adapter
from onecurve.training.models.base_digest import record_base
from onecurve.training.models.shares import Shares
from onecurve.training.parallel.agreement import ask_main_process
from onecurve.training.parallel.loss_scale import restore_loss_scale
from onecurve.training.parallel.states import load_moments
from onecurve.training.process import is_main_process
from onecurve.training.recipe_comparison import find_differing_keys
from onecurve.training.recovery.checkpoints import find_checkpoint, load_progress, set_aside
from onecurve.training.recovery.manifest import find_fault
from onecurve.training.recovery.milestones import Progress
from onecurve.training.recovery.publishing import clean_up, link_best, list_replaced, publish
from onecurve.training.recovery.run_creation import check_writable
from onecurve.training.run_directory import PROGRESS_FILE, RunDirectory


@dataclass(frozen=True)
class Start:
    """Where a training starts.

    Attributes:
        checkpoint: folder to resume from; None starts from the pretrained model.
        progress: where that checkpoint's training stood.
        is_finished: the training is finished; there is nothing to do.
        message: a line for the user.
        corrupt: newer checkpoints that are corrupt.
    """

    checkpoint: Path | None
    progress: Progress
    is_finished: bool = False
    message: str | None = None
    corrupt: tuple[Path, ...] = ()


def find_start(run: RunDirectory, resolved: ResolvedRecipe) -> Start:
    """Decide where to start, from the run directory and the recipe's `resume`. Writes nothing.

    Raises:
        BadInput: the folder is not writable or holds a run of another recipe, or the named checkpoint is not intact.
    """
    check_writable(run)
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
        message = f"{run.path} is finished: {describe_evaluation(run)}. Nothing to do."
        return Start(None, Progress(step=status.get("step", 0)), True, message)
    found, faults = find_checkpoint(run.checkpoints)
    if named is not None and is_main_process():  # It alone knows which one is intact.
        _refuse_older(named, found, run)
    notes = [f"Corrupt, set aside: {checkpoint}: {fault}." for checkpoint, fault in faults.items()]
    if found is not None:
        start = _start_from(found)
    else:  # The earlier start wrote no checkpoint: start where it did.
        start = Start(None, Progress()) if named is None else _open_named(named, resolved)
    notes += [start.message] if start.message else []
    return replace(start, message="\n".join(notes) or None, corrupt=tuple(faults))


def agree_on_start(
    accelerator: Accelerator,
    run: RunDirectory,
    start: Start,
    data: PreparedData,
    model: torch.nn.Module,
    shares: Shares | None = None,
) -> Start:
    """Start every rank where rank 0 does: other ranks may have looked while an old process was still saving.

    Args:
        shares: has the weights that the model does not hold.

    Raises:
        BadInput: on all ranks: the data or the weights that are not trained have changed since the checkpoint, or a rank does
            not see the checkpoint because its machine does not share the file system.
    """
    start = ask_main_process(lambda: _check_base(_check_best(run, _check_data(start, data)), model, shares))
    is_here = start.checkpoint is None or start.checkpoint.is_dir()
    here = accelerator.gather(torch.tensor([is_here], device=accelerator.device)).tolist()
    if not all(here):
        raise BadInput(
            f"rank {here.index(False)} does not see {start.checkpoint}; output_dir must be on a file system that all machines "
            "share"
        )
    return start


def tidy(run: RunDirectory, start: Start) -> str | None:
    """Set corrupt checkpoints aside, and clean up after killed processes; returns a line for the user.

    Rank 0 calls it once every rank has loaded the checkpoint; before, another rank may still be reading it.

    Raises:
        Fault: the best checkpoint of another run can't be copied.
    """
    for checkpoint in start.corrupt:
        set_aside(checkpoint)
    clean_up(run.checkpoints)
    if start.progress.best_step is None:
        return None
    best = run.checkpoint(start.progress.best_step)
    if not best.is_dir() and start.checkpoint is not None:  # The start is a checkpoint of another run.
        _copy(start.checkpoint.with_name(best.name), best)
    return link_best(run, best)  # A kill may have come between the checkpoint's rename and the link to it.


def _copy(checkpoint: Path, target: Path) -> None:
    def fill(staging: Path) -> None:
        for path in checkpoint.iterdir():
            shutil.copyfile(path, staging / path.name)

    problem = publish(target, fill)
    if problem is not None:
        raise Fault(problem)


def _check_best(run: RunDirectory, start: Start) -> Start:
    """Forget a best checkpoint that does not exist any more: the best one is chosen anew."""
    if start.progress.best_step is None or start.checkpoint is None:
        return start
    name = run.checkpoint(start.progress.best_step).name
    replaced = [path.name for path in list_replaced(run.checkpoints)]
    if run.checkpoint(start.progress.best_step).is_dir() or start.checkpoint.with_name(name).is_dir():
        return start
    if any(name in each for each in replaced):
        return start
    start.progress.best_step = start.progress.best_metric = None
    line = f"The best checkpoint, {name}, is missing: the best model is chosen anew from here on."
    return replace(start, message="\n".join(filter(None, (start.message, line))))


def restore(accelerator: Accelerator, model: torch.nn.Module, optimizer: Any, scheduler: Any, start: Start) -> None:
    """Load moments, schedule and loss scale from the checkpoint; the weights were loaded before `prepare`."""
    restore_loss_scale(accelerator, optimizer, start.progress.loss_scale)
    if start.checkpoint is None:
        return
    load_moments(accelerator, model, optimizer, start.checkpoint, start.progress.optimizer_step)
    scheduler.load_state_dict(start.progress.scheduler)
    for group, learning_rate in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
        group["lr"] = learning_rate


def _open_named(checkpoint: Path, resolved: ResolvedRecipe) -> Start:
    """Start from the checkpoint that `resume` names, if it is intact and of the same recipe."""
    reads_content = is_main_process()  # As for the newest checkpoint of a run.
    fault = (
        find_fault(checkpoint, reads_content)
        if checkpoint.is_dir()
        else "no such folder; resume is auto, never or a checkpoint"
    )
    if fault is not None:
        raise BadInput(f"resume: {checkpoint}: {fault}")
    owner = RunDirectory.of_checkpoint(checkpoint)
    if owner.config.exists():
        _refuse_another_recipe(owner, resolved, is_finished=False)
    return _start_from(checkpoint)


def _start_from(checkpoint: Path) -> Start:
    progress = load_progress(checkpoint)
    return Start(checkpoint, progress, message=f"Resuming from {checkpoint} (step {progress.step}).")


def _refuse_older(named: Path, newest: Path | None, run: RunDirectory) -> None:
    """Refuse to go back within a run: new checkpoints would get the names of the newer ones that exist."""
    is_of_this_run = named.resolve().parent == run.checkpoints.resolve()
    if is_of_this_run and (newest is None or named.resolve() != newest.resolve()):
        raise BadInput(
            f"resume: {named} is not the newest intact checkpoint of {str(run.path)!r} "
            f"({'there is none' if newest is None else f'that is {newest.name}'}); to train on from it, choose another "
            "output_dir; to go back, move the newer ones away"
        )


def _refuse_another_recipe(run: RunDirectory, resolved: ResolvedRecipe, is_finished: bool) -> None:
    differing = find_differing_keys(run, resolved.recipe, FREE_KEYS)
    if not differing:
        return
    advice = "choose another output_dir"
    if is_finished:
        advice += f", or train on from its result with --model_name_or_path {run.final} and a new output_dir"
    first = f"{str(run.path)!r} holds a run of another recipe; {advice}. Differing keys:"
    raise BadInput("\n  ".join([first, *differing]))


def _check_data(start: Start, data: PreparedData) -> Start:
    """Refuse data that have changed since the checkpoint, which would give another curve; record those of a new run."""
    for name, split in (("train", data.train), ("validation", data.validation)):
        known = start.progress.data.get(name, split.digest)
        start.progress.data[name] = split.digest
        # Digests of other versions of the data's format cannot be compared.
        if known.startswith(DIGEST_PREFIX) and known != split.digest:
            raise BadInput(
                f"{split.origin}: the {name} data have changed (rows, labels or tokens) since {start.checkpoint} was written; "
                "restore the old data to resume, or choose another output_dir to start a new run"
            )
    return start


def _check_base(start: Start, model: torch.nn.Module, shares: Shares | None) -> Start:
    """Refuse an adapter's model that has changed since the checkpoint, which does not hold it; record that of a new run."""
    if not has_adapter(model):
        return start
    digest = record_base(model, shares)
    if start.progress.data.setdefault("base", digest) != digest:
        raise BadInput(
            f"model_name_or_path: the model's weights have changed since {start.checkpoint} was written, and the adapter in it "
            "fits the old ones only; restore them to resume, or choose another output_dir to start a new run"
        )
    return start


def describe_evaluation(run: RunDirectory) -> str:
    """The evaluation of the final model, in a line: that of the best step, where a metric chose it, or else the last."""
    best_step = load_progress(run.best).step if (run.best / PROGRESS_FILE).is_file() else None
    for text in reversed(run.metrics.read_text(encoding="utf-8").splitlines()):
        line = json.loads(text)
        if line["event"] == "eval" and best_step in (None, line["step"]):
            shown = [f"{name} {value:.4f}" for name, value in line.items() if name.startswith("eval_")]
            return f"step {line['step']}, " + ", ".join(shown[:2])
    return "not evaluated"
