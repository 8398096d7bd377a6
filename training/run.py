"""Fine-tune a pretrained transformer: the whole story, top to bottom.

    accelerate launch --config_file accelerate_configs/cpu.yaml training/run.py --config training/recipes/demo.yaml
    accelerate launch --config_file accelerate_configs/multi_cpu.yaml training/run.py --config RECIPE.yaml --seed 7

The recipe says what is trained, the accelerate YAML where. The losses are the same on every topology.
"""

import sys
import time
from collections.abc import Sequence

import torch
from rich.console import Console

from training import checkpointing, optimization, strategy
from training.config import Recipe, load_recipe, parse_arguments
from training.data import build_loader, prepare_data
from training.evaluation import evaluate, save_evaluation
from training.faults import Outcome, report_outcome
from training.milestones import Milestones
from training.model import build_model, check_head, count_parameters, describe_model, load_config, load_tokenizer
from training.reporting import (
    Reporter,
    build_model_card,
    describe_plan,
    print_evaluation,
    print_next,
    quiet_third_parties,
)
from training.run_directory import RunDirectory
from training.sampling import EvaluationPlan, Order, TrainingPlan
from training.tasks import build_task


def main(arguments: Sequence[str], outcome: Outcome) -> None:
    """Configure, build, train, save."""
    started = time.perf_counter()
    quiet_third_parties()

    # Configure: what to train, and whether this run directory has begun or finished it.
    resolved = load_recipe(*parse_arguments(arguments))
    recipe = resolved.recipe
    strategy.check_launch(recipe)
    run = RunDirectory.of(recipe)
    if resolved.eval_only:
        evaluate_only(recipe, run)
        return
    start = checkpointing.find_start(run, resolved)
    if start.is_finished:
        outcome.say(start.message)
        return

    # Build, before the process group exists: it would time out while data is tokenized, and what is wrong is told sooner.
    task = build_task(recipe)
    config = load_config(recipe)
    tokenizer = load_tokenizer(recipe, config)
    data = prepare_data(recipe, task, tokenizer)
    model_notes = describe_model(config, task, tokenizer)
    model = build_model(recipe, config, task, tokenizer)
    parameters = count_parameters(model)
    if start.checkpoint is not None:
        checkpointing.load_weights(start.checkpoint, model)
    accelerator = strategy.build_accelerator(recipe, model)

    # The plan: which examples make up each step, the same on every topology, and who takes which.
    order = Order(len(data.train), recipe.train_batch_size, recipe.seed, data.train.lengths, recipe.length_window)
    num_steps = optimization.count_steps(recipe, order.steps_per_epoch)
    counts = task.example_counts(data.train.labels)
    memory = (accelerator.num_processes, recipe.per_device_batch_size, recipe.per_device_batch_tokens)
    plan = TrainingPlan(order, num_steps, *memory, counts, start_step=start.progress.step)

    model, optimizer, train_loader, evaluation_loader = accelerator.prepare(
        model,
        optimization.build_optimizer(model, recipe),
        build_loader(data.train, tokenizer, plan, recipe, accelerator),
        build_loader(data.validation, tokenizer, EvaluationPlan(data.validation.lengths, *memory), recipe, accelerator),
    )
    # The schedule is not prepared: accelerate would step it once per process.
    scheduler = optimization.build_scheduler(optimizer, recipe, num_steps)
    checkpointing.restore(accelerator, model, optimizer, scheduler, start)
    progress = start.progress
    limit = recipe.save_total_limit
    checkpoints = checkpointing.CheckpointWriter(accelerator, model, optimizer, scheduler, run, limit)

    if accelerator.is_main_process:
        run.create(resolved, strategy.describe_topology(accelerator))
    outcome.follow(run.status, progress.step)
    strategy.init_trackers(accelerator, resolved)
    milestones = Milestones(recipe, order.steps_per_epoch, num_steps)
    reporter = Reporter(run, accelerator, num_steps, order.steps_per_epoch, progress.step)
    for line in (start.message, model_notes, describe_plan(recipe, accelerator, num_steps, plan, parameters)):
        reporter.say(line)

    # Train: one micro-batch of this process at a time.
    evaluation = None
    step_loss = torch.zeros((), device=accelerator.device)
    with reporter:
        for batch in train_loader:
            plan = batch.pop("plan")
            gradient_scale = strategy.begin_micro_batch(accelerator, plan, recipe.seed)
            with accelerator.accumulate(model):
                loss = task.loss_sum(model, batch) * plan.weight / plan.global_count
                accelerator.backward(loss * gradient_scale)
                step_loss += loss.detach()
                if accelerator.sync_gradients:
                    grad_norm = optimization.clip_gradients(accelerator, model, recipe.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            if not plan.is_last:
                continue

            # The step is made: every process has the same loss, the mean over the whole global batch.
            reporter.log_step(plan, accelerator.reduce(step_loss), grad_norm, scheduler.get_last_lr()[0])
            step_loss = torch.zeros_like(step_loss)
            progress.step = outcome.step = plan.step + 1
            is_best = False
            if not optimization.needs_metric(recipe):
                scheduler.step()
            if milestones.evaluates_after(progress.step):
                evaluation = evaluate(accelerator, model, task, evaluation_loader)
                reporter.log_evaluation(progress.step, evaluation.metrics)
                is_best = milestones.record(progress, evaluation.metrics)
                if optimization.needs_metric(recipe):
                    scheduler.step(evaluation.metrics["eval_loss"])
            if is_best or milestones.saves_after(progress.step):
                reporter.flush()
                checkpoints.save(progress, is_best)
                reporter.restart_clock()
            if milestones.stops_early(progress):
                reporter.say(f"No better {recipe.metric_for_best_model} for a while: stopped early.")
                break

        # Save: the model, and what it says of the validation and the test data.
        if evaluation is None:  # Resumed after the last step.
            evaluation = evaluate(accelerator, model, task, evaluation_loader)
        card = build_model_card(recipe, task, evaluation.metrics)
        checkpointing.save_final(accelerator, model, tokenizer, card, run.final)
        if accelerator.is_main_process:
            save_evaluation(evaluation, task, run.eval_predictions, run.eval_report)
        if data.test is not None:
            test_plan = EvaluationPlan(data.test.lengths, *memory)
            test_loader = accelerator.prepare(build_loader(data.test, tokenizer, test_plan, recipe, accelerator))
            test = evaluate(accelerator, model, task, test_loader, prefix="test")
            reporter.log_evaluation(progress.step, test.metrics, event="test")
            if accelerator.is_main_process:
                save_evaluation(test, task, run.test_predictions, run.test_report)
    print_evaluation(reporter.console, task, evaluation)
    print_next(reporter.console, run, time.perf_counter() - started)
    accelerator.end_training()


def evaluate_only(recipe: Recipe, run: RunDirectory) -> None:
    """Evaluate what was trained, final/ or else the recipe's model, on the test data or else the validation data."""
    if run.final.is_dir():
        recipe = recipe.model_copy(update={"model_name_or_path": str(run.final)})
    task = build_task(recipe)
    config = load_config(recipe)
    tokenizer = load_tokenizer(recipe, config)
    data = prepare_data(recipe, task, tokenizer)
    check_head(config, task)
    model = build_model(recipe, config, task, tokenizer)
    accelerator = strategy.build_accelerator(recipe, model)
    split, prefix = (data.validation, "eval") if data.test is None else (data.test, "test")
    plan = EvaluationPlan(
        split.lengths, accelerator.num_processes, recipe.per_device_batch_size, recipe.per_device_batch_tokens
    )
    model, _, loader = accelerator.prepare(
        model,
        optimization.build_optimizer(model, recipe),  # FSDP and DeepSpeed take a model only with its optimizer.
        build_loader(split, tokenizer, plan, recipe, accelerator),
    )
    evaluation = evaluate(accelerator, model, task, loader, prefix)
    if accelerator.is_main_process:
        names = (run.eval_predictions, run.eval_report) if prefix == "eval" else (run.test_predictions, run.test_report)
        save_evaluation(evaluation, task, *names)
        print_evaluation(Console(), task, evaluation)
    accelerator.end_training()


if __name__ == "__main__":
    sys.exit(report_outcome(main, sys.argv[1:]))
