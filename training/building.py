"""Everything that a training needs, built from the recipe in the one order that works.

Data is tokenized and the model loaded before the process group exists: a group would time out waiting, and what is wrong
is told sooner.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.utils.data import DataLoader

from onecurve.training.config import Recipe, ResolvedRecipe
from onecurve.training.data.plan import EvaluationPlan, Order, TrainingPlan
from onecurve.training.data.preparation import PreparedData, Split, build_loader, prepare_data
from onecurve.training.models import cpu_dropout, last_layer, optimization
from onecurve.training.models.loading import (
    build_model,
    check_head,
    count_parameters,
    describe_model,
    load_config,
    load_tokenizer,
)
from onecurve.training.outcome import Outcome
from onecurve.training.parallel.accelerator import build_accelerator
from onecurve.training.parallel.agreement import ask_main_process
from onecurve.training.parallel.launch import Launch
from onecurve.training.parallel.states import count_state_bytes, keep_exact_weights, load_weights, set_exact_weights
from onecurve.training.parallel.topology import describe_topology
from onecurve.training.process import launcher_has_died
from onecurve.training.record.environment import describe_environment
from onecurve.training.record.reporter import Reporter, describe_plan
from onecurve.training.record.trackers import start_tracker
from onecurve.training.recovery import out_of_memory as memory
from onecurve.training.recovery.checkpoint_writer import CheckpointWriter
from onecurve.training.recovery.milestones import Milestones, Progress
from onecurve.training.recovery.resumption import Start, agree_on_start, restore, tidy
from onecurve.training.recovery.room import check_room
from onecurve.training.recovery.run_creation import create_run
from onecurve.training.recovery.run_lock import RunLock
from onecurve.training.recovery.stops import StopFlag
from onecurve.training.recovery.watchdog import Watchdog
from onecurve.training.run_directory import RunDirectory
from onecurve.training.schedule import count_steps
from onecurve.training.tasks import TextClassification, build_task

Loader = DataLoader[dict[str, Any]]


@dataclass
class Training:
    """The parts of one training, prepared and restored. Only the loader and its plan ever change."""

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
    plan: TrainingPlan
    train_loader: Loader
    evaluation_loader: Loader
    test_loader: Loader | None
    milestones: Milestones
    progress: Progress
    checkpoints: CheckpointWriter
    reporter: Reporter
    stop_flag: StopFlag
    watchdog: Watchdog


def build(
    resolved: ResolvedRecipe,
    run: RunDirectory,
    outcome: Outcome,
    start: Start | None = None,
    lock: RunLock | None = None,
) -> Training:
    """Load, check, prepare and restore; on return the run directory exists and the arithmetic is printed.

    Args:
        start: where to begin; None builds only what an evaluation needs, and writes nothing.

    Raises:
        BadInput: data, model or machine can't do what the recipe asks.
        WrongTopology: the processes that came up are not those that were asked for.
    """
    # The group, in which processes may wait in vain, is joined in `_build`.
    launch = Launch.from_environment()
    watchdog = Watchdog(
        run.hangs,
        launch.rank,
        launch.num_processes,
        resolved.recipe.hang_timeout_seconds,
        lambda message: outcome.write_status("failed", 1, message),
        launcher_has_died,
    )
    try:
        return _build(resolved, run, outcome, start, lock, watchdog)
    except BaseException:
        watchdog.stop()
        raise


def _build(
    resolved: ResolvedRecipe,
    run: RunDirectory,
    outcome: Outcome,
    start: Start | None,
    lock: RunLock | None,
    watchdog: Watchdog,
) -> Training:
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
    parameters, state_bytes = count_parameters(model), count_state_bytes(model)
    watchdog.start()
    accelerator = build_accelerator(recipe, model, watchdog.collective_timeout)
    if start is not None:
        start = agree_on_start(accelerator, start, data)
        if start.checkpoint is not None:
            load_weights(start.checkpoint, model)
    if accelerator.device.type == "cpu":
        cpu_dropout.install(model, recipe)
    last_layer.install(model)

    # The plan: which examples make up each step, the same on every topology, and who takes which.
    progress = start.progress if start else Progress()
    order = Order(len(data.train), recipe.train_batch_size, recipe.seed, data.train.lengths, recipe.length_window)
    num_steps = count_steps(recipe, order.steps_per_epoch)
    # Devices may differ, and the plan must not.
    sizes = ask_main_process(lambda: memory.load_limits(run, _describe_memory(recipe, accelerator))) or {
        "max_examples": recipe.per_device_batch_size,
        "max_tokens": recipe.per_device_batch_tokens,
    }
    plan = TrainingPlan(
        order,
        num_steps,
        accelerator.num_processes,
        **sizes,
        counts=task.example_counts(data.train.labels),
        start_step=progress.step,
    )
    exact_weights = keep_exact_weights(accelerator, model)
    model, optimizer, train_loader, evaluation_loader = accelerator.prepare(
        model,
        optimization.build_optimizer(model, recipe),
        build_loader(data.train, tokenizer, plan, recipe, accelerator),
        build_evaluation_loader(data.validation, tokenizer, recipe, accelerator),
    )
    set_exact_weights(model, exact_weights)
    del exact_weights  # As large as the model.
    test_loader = None
    if data.test is not None:
        test_loader = accelerator.prepare(build_evaluation_loader(data.test, tokenizer, recipe, accelerator))
    # The schedule is not prepared: accelerate would step it once per process.
    scheduler = optimization.build_scheduler(optimizer, recipe, num_steps)
    milestones = Milestones(recipe, order.steps_per_epoch, num_steps)
    reporter = Reporter(run, accelerator, plan, progress)
    # A STOP in the run directory is for the training there.
    stop_flag = StopFlag(run if start is not None else None, watchdog, outcome)
    if start is not None and lock is not None:
        restore(accelerator, model, optimizer, scheduler, start)
        accelerator.wait_for_everyone()  # Another one may still read a checkpoint that is about to get its name back.
        room = (state_bytes, parameters[1] * 4, milestones.most_checkpoints())
        environment = describe_environment(describe_topology(accelerator), task.main_metrics)
        ask_main_process(lambda: _prepare_directory(run, lock, resolved, environment, start, room))
        outcome.add_status_file(run.status, progress.step)
        start_tracker(accelerator, run, resolved, progress.step)
        for line in (*notes, describe_plan(recipe, accelerator, num_steps, plan, parameters)):
            reporter.say(line)
    stop_flag.listen()
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
        plan=plan,
        train_loader=train_loader,
        evaluation_loader=evaluation_loader,
        test_loader=test_loader,
        milestones=milestones,
        progress=progress,
        checkpoints=CheckpointWriter(accelerator, model, optimizer, scheduler, run, recipe.save_total_limit),
        reporter=reporter,
        stop_flag=stop_flag,
        watchdog=watchdog,
    )


def _prepare_directory(
    run: RunDirectory,
    lock: RunLock,
    resolved: ResolvedRecipe,
    environment: dict[str, Any],
    start: Start,
    room: tuple[int, int, int],
) -> None:
    check_room(run, *room)
    create_run(run, lock, resolved, environment)
    tidy(run, start)


def shrink_micro_batches(training: Training) -> None:
    """After a device ran out of memory, plan smaller micro-batches from the step that failed on.

    Raises:
        OutOfMemory: one example does not fit, other processes wait for this one, or gradients lie where only their
            strategy can clear them.
    """
    accelerator, recipe, plan, step = training.accelerator, training.recipe, training.plan, training.progress.step
    max_examples, max_tokens = memory.shrink(plan, step)
    sizes = {"max_examples": max_examples, "max_tokens": max_tokens}
    memory.save_limits(training.run, _describe_memory(recipe, accelerator), sizes)
    size = (
        f"{max_examples} example{'s' * (max_examples != 1)}"
        if max_tokens == plan.max_tokens
        else f"{max_tokens} tokens"
    )
    if accelerator.num_processes > 1 or accelerator.distributed_type in (
        DistributedType.DEEPSPEED,
        DistributedType.FSDP,
    ):
        raise memory.OutOfMemory(
            f"process {accelerator.process_index} ran out of memory at step {step + 1}; start it again, and it goes on "
            f"from the last checkpoint with micro-batches of at most {size} (the curve stays the same)"
        )
    training.model.zero_grad()  # The optimizer's, as accelerate wraps it, does nothing in the middle of a step.
    training.plan = replace(plan, start_step=step, max_examples=max_examples, max_tokens=max_tokens)
    loader = build_loader(training.data.train, training.tokenizer, training.plan, recipe, accelerator)
    training.train_loader = accelerator.prepare(loader)
    training.reporter.say(f"Out of memory at step {step + 1}: from here on micro-batches have at most {size}.")


def _describe_memory(recipe: Recipe, accelerator: Accelerator) -> dict[str, Any]:
    """What decides whether a micro-batch fits."""
    return {
        "per_device_batch_size": recipe.per_device_batch_size,
        "per_device_batch_tokens": recipe.per_device_batch_tokens,
        "gradient_checkpointing": recipe.gradient_checkpointing,
        **describe_topology(accelerator),
    }


def build_evaluation_loader(split: Split, tokenizer: Any, recipe: Recipe, accelerator: Accelerator) -> Loader:
    """A loader, to be prepared, that visits each example of a split once on any number of processes."""
    plan = EvaluationPlan(
        split.lengths, accelerator.num_processes, recipe.per_device_batch_size, recipe.per_device_batch_tokens
    )
    return build_loader(split, tokenizer, plan, recipe, accelerator)
