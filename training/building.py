"""Everything that a training needs, built from the recipe in the one order that works.

Data is tokenized and the model loaded before the process group exists: a group would time out waiting, and what is wrong
is told sooner.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from training import cpu_dropout, optimization, strategy
from training.checkpointing import CheckpointWriter
from training.config import Recipe, ResolvedRecipe
from training.data import PreparedData, Split, build_loader, prepare_data
from training.faults import Outcome
from training.milestones import Milestones, Progress
from training.model import build_model, check_head, count_parameters, describe_model, load_config, load_tokenizer
from training.reporting import Reporter, describe_plan
from training.resumption import Start, restore
from training.run_directory import RunDirectory
from training.sampling import EvaluationPlan, Order, TrainingPlan
from training.states import load_weights
from training.stopping import StopFlag
from training.tasks import TextClassification, build_task

Loader = DataLoader[dict[str, Any]]


@dataclass(frozen=True)
class Training:
    """The parts of one training, prepared and restored."""

    recipe: Recipe
    run: RunDirectory
    outcome: Outcome
    accelerator: Accelerator
    task: TextClassification
    data: PreparedData
    tokenizer: Any
    model: torch.nn.Module
    optimizer: Any
    scheduler: Any
    train_loader: Loader
    evaluation_loader: Loader
    milestones: Milestones
    progress: Progress
    checkpoints: CheckpointWriter
    reporter: Reporter
    stop_flag: StopFlag


def build(resolved: ResolvedRecipe, run: RunDirectory, outcome: Outcome, start: Start | None = None) -> Training:
    """Load, check, prepare and restore; on return the run directory exists and the arithmetic is printed.

    Args:
        start: where to begin; None builds only what an evaluation needs, and writes nothing.

    Raises:
        BadInput: data, model or machine can't do what the recipe asks.
        WrongTopology: the processes that came up are not those that were asked for.
    """
    recipe = resolved.recipe
    if resolved.eval_only and run.final.is_dir():
        recipe = recipe.model_copy(update={"model_name_or_path": str(run.final)})
    task = build_task(recipe)
    config = load_config(recipe)
    tokenizer = load_tokenizer(recipe, config)
    data = prepare_data(recipe, task, tokenizer)
    if resolved.eval_only:
        check_head(config, task)
    notes = [start.message if start else None, describe_model(config, task, tokenizer)]
    model = build_model(recipe, config, task, tokenizer)
    parameters = count_parameters(model)
    if start is not None and start.checkpoint is not None:
        load_weights(start.checkpoint, model)
    accelerator = strategy.build_accelerator(recipe, model)
    if accelerator.device.type == "cpu":
        cpu_dropout.install(model, recipe)

    # The plan: which examples make up each step, the same on every topology, and who takes which.
    progress = start.progress if start else Progress()
    order = Order(len(data.train), recipe.train_batch_size, recipe.seed, data.train.lengths, recipe.length_window)
    num_steps = optimization.count_steps(recipe, order.steps_per_epoch)
    plan = TrainingPlan(
        order,
        num_steps,
        accelerator.num_processes,
        recipe.per_device_batch_size,
        recipe.per_device_batch_tokens,
        counts=task.example_counts(data.train.labels),
        start_step=progress.step,
    )
    model, optimizer, train_loader, evaluation_loader = accelerator.prepare(
        model,
        optimization.build_optimizer(model, recipe),
        build_loader(data.train, tokenizer, plan, recipe, accelerator),
        build_evaluation_loader(data.validation, tokenizer, recipe, accelerator),
    )
    # The schedule is not prepared: accelerate would step it once per process.
    scheduler = optimization.build_scheduler(optimizer, recipe, num_steps)
    reporter = Reporter(run, accelerator, num_steps, order.steps_per_epoch, progress)
    if start is not None:
        restore(accelerator, model, optimizer, scheduler, start)
        if accelerator.is_main_process:
            run.create(resolved, strategy.describe_topology(accelerator))
        outcome.follow(run.status, progress.step)
        strategy.init_trackers(accelerator, resolved)
        for line in (*notes, describe_plan(recipe, accelerator, num_steps, plan, parameters)):
            reporter.say(line)
    return Training(
        recipe=recipe,
        run=run,
        outcome=outcome,
        accelerator=accelerator,
        task=task,
        data=data,
        tokenizer=tokenizer,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        train_loader=train_loader,
        evaluation_loader=evaluation_loader,
        milestones=Milestones(recipe, order.steps_per_epoch, num_steps),
        progress=progress,
        checkpoints=CheckpointWriter(accelerator, model, optimizer, scheduler, run, recipe.save_total_limit),
        reporter=reporter,
        stop_flag=StopFlag(run),
    )


def build_evaluation_loader(split: Split, tokenizer: Any, recipe: Recipe, accelerator: Accelerator) -> Loader:
    """A loader, to be prepared, that visits each example of a split once on any number of processes."""
    plan = EvaluationPlan(
        split.lengths, accelerator.num_processes, recipe.per_device_batch_size, recipe.per_device_batch_tokens
    )
    return build_loader(split, tokenizer, plan, recipe, accelerator)
