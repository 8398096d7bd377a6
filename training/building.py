"""Everything that a training needs, built from the recipe in the one order that works.

Data is tokenized and the model loaded before the process group exists: a group would time out waiting, and errors in them
surface early.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from onecurve.training.cache import check_folders
from onecurve.training.config import Recipe, ResolvedRecipe
from onecurve.training.data.layout import Layout
from onecurve.training.data.loading import Loader, build_evaluation_plan, build_loader
from onecurve.training.data.plan import Order, TrainingPlan
from onecurve.training.data.preparation import PreparedData, Split, prepare_data
from onecurve.training.launch_protocol import BAD_INPUT
from onecurve.training.models import example_dropout, last_layer, optimization
from onecurve.training.models.adapters import has_adapter, needs_base
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
    build_offload_operators,
    second_names_removed,
    shared_embeddings_at_the_root,
)
from onecurve.training.parallel.agreement import ask_main_process
from onecurve.training.parallel.deepspeed_states import share_weights
from onecurve.training.parallel.launch import Launch, limited_joining
from onecurve.training.parallel.states import (
    count_state_bytes,
    keep_exact_weights,
    lies_in_host_memory,
    load_weights,
    set_exact_weights,
    set_shares,
)
from onecurve.training.parallel.topology import describe_topology
from onecurve.training.parallel.zero3 import divide_model
from onecurve.training.process import launcher_has_died
from onecurve.training.record import samples
from onecurve.training.record.console import describe_arithmetic
from onecurve.training.record.data_summary import describe_data
from onecurve.training.record.environment import describe_changes, describe_environment
from onecurve.training.record.evaluation import EvaluationData
from onecurve.training.record.inputs import describe_inputs
from onecurve.training.record.reporter import Reporter
from onecurve.training.record.trackers import start_tracker
from onecurve.training.recovery import out_of_memory
from onecurve.training.recovery.checkpoint_writer import CheckpointWriter
from onecurve.training.recovery.dealing import find_writers
from onecurve.training.recovery.milestones import Milestones, Progress
from onecurve.training.recovery.resumption import Start, agree_on_start, restore, tidy
from onecurve.training.recovery.room import check_room
from onecurve.training.recovery.run_creation import create_run
from onecurve.training.recovery.run_lock import RunLock
from onecurve.training.recovery.stops import StopFlag
from onecurve.training.recovery.watchdog import Watchdog
from onecurve.training.run_directory import PIECE_BYTES, RunDirectory
from onecurve.training.schedule import count_steps
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
class _Loaded:
    """What needs no process group.

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


def _load(resolved: ResolvedRecipe, run: RunDirectory) -> _Loaded:
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
    return _Loaded(
        recipe, task, processor, data, model, (*data.notes, *notes), count_parameters(model), count_state_bytes(model), shares
    )  # fmt: skip


def _join(
    loaded: _Loaded,
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
    build_offload_operators(accelerator)
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
        _begin(session, replace(loaded, notes=(*loaded.notes, layout_note)), resolved, start, lock)
    session.stop_flag.listen()
    return session


def _exchange_parts(model: torch.nn.Module, recipe: Recipe, accelerator: Accelerator) -> Attention:
    """Give the model what it computes faster, or the same on every topology, with. Before it is sharded."""
    example_dropout.install(model, recipe, accelerator.device)
    last_layer.install(model)
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


def _prepare_evaluation(loaded: _Loaded, accelerator: Accelerator, layout: Layout, split: Split) -> EvaluationData:
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
    sizes = ask_main_process(lambda: out_of_memory.load_limits(run, _describe_memory(recipe, accelerator, layout)))
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


def _begin(session: Session, loaded: _Loaded, resolved: ResolvedRecipe, start: Start, lock: RunLock) -> None:
    """Restore the start, write what a run directory holds before the first step, and say what the user should know."""
    accelerator, run = session.accelerator, session.run
    restore(accelerator, session.model, session.optimizer, session.scheduler, start)
    accelerator.wait_for_everyone()  # Another one may still read a checkpoint that is about to get its name back.
    environment = describe_environment(describe_topology(accelerator), session.task.main_metrics)
    num_checkpoints = session.milestones.most_checkpoints()
    trained, total = loaded.parameters
    num_local = Launch.from_environment().num_local_processes
    held_bytes = loaded.state_bytes * num_local // accelerator.num_processes
    if lies_in_host_memory(accelerator, session.model):
        held_bytes = min(held_bytes, 3 * PIECE_BYTES * num_local)

    def prepare_directory() -> str | None:
        about = {
            "start_step": session.progress.step,
            "parameters": total,
            "trained_parameters": trained,
            "data": describe_data(session.data),
            "inputs": describe_inputs(session.recipe, session.task, session.data),
        }
        final_bytes = 4 * (trained if has_adapter(loaded.model) else total)
        final_bytes += 4 * total * session.recipe.merge_adapter
        check_room(run, loaded.state_bytes, final_bytes, num_checkpoints, held_bytes)
        owner = (
            run
            if run.environment.exists() or start.checkpoint is None
            else RunDirectory.of_checkpoint(start.checkpoint)
        )
        changes = describe_changes(owner.read_environment(), environment) if start.checkpoint is not None else None
        create_run(run, lock, resolved, environment | about)
        samples.cut_back(run, session.progress.step)
        return "\n".join(filter(None, (changes, tidy(run, start)))) or None

    note = ask_main_process(prepare_directory)
    session.checkpoints.writers, writers_note = find_writers(accelerator, run)
    session.checkpoints.say = session.reporter.say
    session.outcome.add_status_file(run.status, session.progress.step)
    start_tracker(accelerator, run, resolved, session.progress.step)
    arithmetic = describe_arithmetic(
        session.recipe, accelerator, session.plan.stop_step, session.plan, loaded.parameters
    )
    for line in (start.message, note, writers_note, *loaded.notes, arithmetic):
        session.reporter.say(line)


def shrink_micro_batches(session: Session) -> None:
    """After a device ran out of memory, plan smaller micro-batches from the step that failed on.

    Raises:
        OutOfMemory: one example does not fit, other processes wait for this one, or gradients lie where only their
            strategy can clear them.
    """
    accelerator, recipe, plan, step = session.accelerator, session.recipe, session.plan, session.progress.step
    max_examples, max_tokens = out_of_memory.shrink(plan, step)
    sizes = {"max_examples": max_examples, "max_tokens": max_tokens}
    out_of_memory.save_limits(session.run, _describe_memory(recipe, accelerator, session.layout), sizes)
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


def _describe_memory(recipe: Recipe, accelerator: Accelerator, layout: Layout) -> dict[str, Any]:
    """What decides whether a micro-batch fits."""
    return {
        "per_device_batch_size": recipe.per_device_batch_size,
        "per_device_batch_tokens": recipe.per_device_batch_tokens,
        "gradient_checkpointing": recipe.gradient_checkpointing,
        "is_packed": layout.is_packed,
        **describe_topology(accelerator),
    }
