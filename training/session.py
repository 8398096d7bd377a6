"""One start of a training: its parts, and how its micro-batches shrink where they do not fit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from onecurve.training.config import Recipe
from onecurve.training.data.layout import Layout
from onecurve.training.data.loading import Loader, build_loader
from onecurve.training.data.plan import TrainingPlan
from onecurve.training.data.preparation import PreparedData
from onecurve.training.models.shares import Shares
from onecurve.training.outcome import Outcome
from onecurve.training.parallel.topology import describe_topology
from onecurve.training.record.evaluation import EvaluationData
from onecurve.training.record.reporter import Reporter
from onecurve.training.recovery import out_of_memory
from onecurve.training.recovery.checkpoint_writer import CheckpointWriter
from onecurve.training.recovery.milestones import Milestones, Progress
from onecurve.training.recovery.stops import StopFlag
from onecurve.training.recovery.watchdog import Watchdog
from onecurve.training.run_directory import RunDirectory
from onecurve.training.tasks import Task


@dataclass
class Session:
    """The parts of one start of a training, prepared and restored. Only the loader and its plan ever change."""

    recipe: Recipe
    run: RunDirectory
    outcome: Outcome
    accelerator: Accelerator
    task: Task
    data: PreparedData
    processor: Any
    model: torch.nn.Module
    optimizer: Any
    scheduler: Any
    plan: TrainingPlan
    layout: Layout
    train_loader: Loader
    validation: EvaluationData
    test: EvaluationData | None
    milestones: Milestones
    progress: Progress
    checkpoints: CheckpointWriter
    reporter: Reporter
    stop_flag: StopFlag
    watchdog: Watchdog


@dataclass(frozen=True)
class Loaded:
    """What a start has loaded before its process group exists.

    Attributes:
        notes: lines for the user.
        parameters: trained and all.
        state_bytes: of weights, buffers and moments.
        shares: this process's parts of the weights, where it does not hold the whole model.
    """

    recipe: Recipe
    task: Task
    processor: Any
    data: PreparedData
    model: torch.nn.Module
    notes: tuple[str | None, ...]
    parameters: tuple[int, int]
    state_bytes: int
    shares: Shares | None


def shrink_micro_batches(session: Session) -> None:
    """After a device ran out of memory, plan smaller micro-batches from the step that failed on.

    Raises:
        OutOfMemory: one example does not fit, other processes wait for this one, or gradients lie where only their
            strategy can clear them.
    """
    accelerator, recipe, plan, step = session.accelerator, session.recipe, session.plan, session.progress.step
    max_examples, max_tokens = out_of_memory.shrink(plan, step)
    sizes = {"max_examples": max_examples, "max_tokens": max_tokens}
    out_of_memory.save_limits(session.run, describe_memory(recipe, accelerator, session.layout), sizes)
    size = (
        f"{max_examples} example{'s' * (max_examples != 1)}"
        if max_tokens == plan.max_tokens
        else f"{max_tokens} tokens"
    )
    if accelerator.num_processes > 1 or accelerator.distributed_type in (
        DistributedType.DEEPSPEED,
        DistributedType.FSDP,
    ):
        raise out_of_memory.OutOfMemory(
            f"rank {accelerator.process_index} ran out of memory at step {step + 1}; start it again, and it resumes "
            f"from the last checkpoint with micro-batches of at most {size} (the curve stays the same)"
        )
    session.model.zero_grad()  # The optimizer's, as accelerate wraps it, does nothing in the middle of a step.
    session.plan = replace(plan, start_step=step, max_examples=max_examples, max_tokens=max_tokens)
    data, layout = session.data.train, session.layout
    loader = build_loader(data, session.task, session.processor, session.plan, recipe, accelerator, layout)
    session.train_loader = accelerator.prepare(loader)
    session.reporter.say(f"Out of memory at step {step + 1}: from here on micro-batches have at most {size}.")


def describe_memory(recipe: Recipe, accelerator: Accelerator, layout: Layout) -> dict[str, Any]:
    """What decides whether a micro-batch fits."""
    return {
        "per_device_batch_size": recipe.per_device_batch_size,
        "per_device_batch_tokens": recipe.per_device_batch_tokens,
        "gradient_checkpointing": recipe.gradient_checkpointing,
        "is_packed": layout.is_packed,
        **describe_topology(accelerator),
    }
