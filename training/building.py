"""Everything that a training needs, built from the recipe in the one order that works.

Data is tokenized and the model loaded before the process group exists: a group would time out waiting, and errors in them
surface early.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator

from onecurve.training.cache import check_folders
from onecurve.training.config import Recipe, ResolvedRecipe
from onecurve.training.data.layout import Layout
from onecurve.training.data.loading import build_evaluation_plan, build_loader
from onecurve.training.data.plan import Order, TrainingPlan
from onecurve.training.data.preparation import Split, prepare_data
from onecurve.training.launch_protocol import BAD_INPUT
from onecurve.training.models import example_dropout, last_layer, optimization, rms_norms
from onecurve.training.models.adapters import needs_base
from onecurve.training.models.allocator import keep_blocks, return_free_pages, return_large_blocks
from onecurve.training.models.base_digest import check_base
from onecurve.training.models.compilation import compile_layers
from onecurve.training.models.loading import (
    build_model,
    count_parameters,
    describe_model,
    load_task,
)
from onecurve.training.models.mask_trial import try_masks
from onecurve.training.models.packing import Attention, choose_layout, prepare_attention
from onecurve.training.models.saving import save_config_and_processor
from onecurve.training.models.shares import Shares
from onecurve.training.outcome import Outcome
from onecurve.training.parallel.accelerator import (
    build_accelerator,
    build_offload_optimizer,
    second_names_removed,
    shared_embeddings_at_the_root,
)
from onecurve.training.parallel.agreement import ask_main_process
from onecurve.training.parallel.deepspeed_states import share_weights
from onecurve.training.parallel.launch import Launch, limited_joining
from onecurve.training.parallel.states import (
    count_state_bytes,
    keep_exact_weights,
    load_weights,
    set_exact_weights,
    set_shares,
)
from onecurve.training.parallel.zero3 import divide_model
from onecurve.training.process import launcher_has_died
from onecurve.training.record.evaluation import EvaluationData
from onecurve.training.record.reporter import Reporter
from onecurve.training.recovery import out_of_memory
from onecurve.training.recovery.checkpoint_writer import CheckpointWriter
from onecurve.training.recovery.milestones import Milestones, Progress
from onecurve.training.recovery.resumption import Start, agree_on_start
from onecurve.training.recovery.run_lock import RunLock
from onecurve.training.recovery.stops import StopFlag
from onecurve.training.recovery.watchdog import Watchdog
from onecurve.training.run_directory import RunDirectory
from onecurve.training.run_start import begin
from onecurve.training.schedule import count_steps
from onecurve.training.session import Loaded, Session, describe_memory
from onecurve.training.tasks import Task


def build(
    resolved: ResolvedRecipe,
    run: RunDirectory,
    outcome: Outcome,
    start: Start | None = None,
    lock: RunLock | None = None,
) -> Session:
    """Load, check, prepare and restore; on return the run directory exists and the arithmetic is printed.

    Args:
        start: where to begin; None builds only what an evaluation needs, and writes nothing.
        lock: of the run directory, where there is a start.

    Raises:
        BadInput: data, model or machine can't do what the recipe asks.
        WrongTopology: the processes that came up are not those that were asked for.
    """
    launch = Launch.from_environment()
    watchdog = Watchdog(
        run.hangs,
        launch.rank,
        launch.num_processes,
        resolved.recipe.hang_timeout_seconds,
        lambda message: outcome.write_status("failed", 1, message),
        launcher_has_died,
    )
    loaded = _load(resolved, run)
    try:
        # From here on processes wait for each other.
        watchdog.start()
        return _join(loaded, resolved, run, outcome, start, lock, watchdog)
    except BaseException:
        watchdog.stop()
        raise


def _load(resolved: ResolvedRecipe, run: RunDirectory) -> Loaded:
    recipe = resolved.recipe
    if resolved.eval_only and run.final.is_dir():
        recipe = recipe.model_copy(update={"model_name_or_path": str(run.final)})
    check_folders((recipe.model_name_or_path, recipe.tokenizer_name, recipe.dataset_name))
    task, config, processor = load_task(recipe)
    return_large_blocks()  # Preparing data, and later where the weights are divided.
    data = prepare_data(recipe, task, processor)
    if resolved.eval_only:
        task.check_head(config)
    notes: tuple[str | None, ...] = (describe_model(config, task, processor), task.describe_left_out())
    launch = Launch.from_environment()
    cut = launch.find_cut()
    if cut is None and launch.find_device_type() == "cpu":
        keep_blocks()
    shares = None
    if cut is not None and not needs_base(recipe):
        shares = Shares(cut, keeps_maps=recipe.adapter != "none")
    model = build_model(recipe, config, task, processor, shares)
    if resolved.eval_only:
        check_base(model, run.final, shares)
    else:
        # A model without weights has the same losses whatever is dropped.
        notes = (*notes, try_masks(model, task, processor, data.train, recipe) if shares is None else None)
    return Loaded(
        recipe, task, processor, data, model, (*data.notes, *notes), count_parameters(model), count_state_bytes(model), shares
    )  # fmt: skip


def _join(
    loaded: Loaded,
    resolved: ResolvedRecipe,
    run: RunDirectory,
    outcome: Outcome,
    start: Start | None,
    lock: RunLock | None,
    watchdog: Watchdog,
) -> Session:
    """Join the process group, prepare everything for it, and restore what the start asks for."""
    recipe, task, data, model, shares = loaded.recipe, loaded.task, loaded.data, loaded.model, loaded.shares
    accelerator = _join_group(recipe, model, outcome, watchdog)
    build_offload_optimizer(accelerator)
    if start is not None:
        start = agree_on_start(accelerator, run, start, data, model, shares)
        if start.checkpoint is not None:
            load_weights(start.checkpoint, model, shares)
    attention = _exchange_parts(model, recipe, accelerator)
    describe = partial(save_config_and_processor, model, loaded.processor)
    model, optimizer = _prepare(accelerator, model, recipe, shares)
    layout, layout_note = choose_layout(accelerator, model, attention, task, loaded.processor, recipe)
    progress = start.progress if start else Progress()
    plan = _build_plan(recipe, run, accelerator, data.train, progress, layout, task)
    train_loader = build_loader(data.train, task, loaded.processor, plan, recipe, accelerator, layout)
    prepare_evaluation = partial(_prepare_evaluation, loaded, accelerator, layout)

    session = Session(
        recipe=recipe,
        run=run,
        outcome=outcome,
        accelerator=accelerator,
        task=task,
        data=data,
        processor=loaded.processor,
        model=model,
        optimizer=optimizer,
        # The schedule is not prepared: accelerate would step it once per process.
        scheduler=(scheduler := optimization.build_scheduler(optimizer, recipe, plan.stop_step)),
        plan=plan,
        layout=layout,
        train_loader=accelerator.prepare(train_loader),
        validation=prepare_evaluation(data.validation),
        test=None if data.test is None else prepare_evaluation(data.test),
        milestones=Milestones(recipe, plan.order.steps_per_epoch, plan.stop_step),
        progress=progress,
        checkpoints=CheckpointWriter(accelerator, model, optimizer, scheduler, run, recipe.save_total_limit, describe),
        reporter=Reporter(run, accelerator, plan, progress, task.main_metrics),
        # A STOP in the run directory is for the training there.
        stop_flag=StopFlag(run if start is not None else None, watchdog, outcome),
        watchdog=watchdog,
    )
    if start is not None and lock is not None:
        begin(session, replace(loaded, notes=(*loaded.notes, layout_note)), resolved, start, lock)
    session.stop_flag.listen()
    return session


def _exchange_parts(model: torch.nn.Module, recipe: Recipe, accelerator: Accelerator) -> Attention:
    """Give the model what it computes faster, or the same on every topology, with. Before it is sharded."""
    example_dropout.install(model, recipe, accelerator.device)
    last_layer.install(model)
    rms_norms.install(model)
    attention = prepare_attention(model, recipe)
    if recipe.torch_compile:
        compile_layers(model)
    return attention


def _prepare(
    accelerator: Accelerator, model: torch.nn.Module, recipe: Recipe, shares: Shares | None
) -> tuple[torch.nn.Module, Any]:
    """The model and its optimizer, as the strategy wraps and divides them, with the weights that were read."""
    if shares is not None:
        shares.check(model)
    exact_weights = keep_exact_weights(accelerator, model, shares)
    optimizer = optimization.build_optimizer(model, recipe)
    divide_model(accelerator, model, shares)
    with shared_embeddings_at_the_root(accelerator, model), second_names_removed(accelerator, model):
        prepared, optimizer = accelerator.prepare(model, optimizer)
    share_weights(optimizer.optimizer)
    set_exact_weights(prepared, exact_weights, shares)
    set_shares(prepared, shares)
    if shares is not None:
        return_free_pages()  # Where weights lay before they were divided.
    return prepared, optimizer


def _prepare_evaluation(loaded: Loaded, accelerator: Accelerator, layout: Layout, split: Split) -> EvaluationData:
    """Micro-batches of a split, for every process."""
    evaluation_plan = build_evaluation_plan(split, loaded.recipe, accelerator.num_processes, layout)
    loader = build_loader(split, loaded.task, loaded.processor, evaluation_plan, loaded.recipe, accelerator, layout)
    return EvaluationData(split, evaluation_plan, accelerator.prepare(loader), layout)


def _join_group(recipe: Recipe, model: torch.nn.Module, outcome: Outcome, watchdog: Watchdog) -> Accelerator:
    launch = Launch.from_environment()
    watched = contextlib.nullcontext() if launch.is_unsupervised else watchdog.joining(recipe.join_timeout_seconds)
    with limited_joining(launch, lambda message: outcome.write_status("failed", BAD_INPUT, message)), watched:
        return build_accelerator(recipe, model, watchdog.choose_collective_timeout(recipe.join_timeout_seconds))


def _build_plan(
    recipe: Recipe,
    run: RunDirectory,
    accelerator: Accelerator,
    train: Split,
    progress: Progress,
    layout: Layout,
    task: Task,
) -> TrainingPlan:
    """Which examples make up each step, the same on every topology, and which process takes which."""
    order = Order(len(train), recipe.train_batch_size, recipe.seed, train.lengths, recipe.length_window)
    # Devices may differ, and the plan must not.
    sizes = ask_main_process(lambda: out_of_memory.load_limits(run, describe_memory(recipe, accelerator, layout)))
    return TrainingPlan(
        order,
        count_steps(recipe, order.steps_per_epoch),
        accelerator.num_processes,
        **(sizes or {"max_examples": recipe.per_device_batch_size, "max_tokens": recipe.per_device_batch_tokens}),
        counts=train.counts,
        start_step=progress.step,
        is_packed=layout.is_packed,
        draw_counts=partial(task.draw_counts, train.examples),
        identities=train.identities,
    )
