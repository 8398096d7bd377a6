"""Fine-tune a pretrained transformer: the whole story, top to bottom.

    accelerate launch --config_file accelerate_configs/cpu.yaml training/run.py --config training/recipes/demo.yaml
    accelerate launch --config_file accelerate_configs/multi_cpu.yaml training/run.py --config RECIPE.yaml --seed 7

The recipe says what is trained, the accelerate YAML where. The losses are the same on every topology.
"""

import sys
import time
from collections.abc import Sequence

import torch

from training import checkpointing, optimization, strategy
from training.config import load_recipe, parse_arguments
from training.data import build_loader, prepare_data
from training.evaluation import evaluate, format_predictions
from training.faults import Outcome, report_outcome, write_atomically
from training.milestones import Milestones
from training.model import build_model, count_parameters, describe_head, load_config, load_tokenizer
from training.reporting import Reporter, build_model_card, describe_plan, print_summary, quiet_third_parties
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
    strategy.check_launch()
    run = RunDirectory.of(recipe)
    start = checkpointing.find_start(run, resolved)
    if start.is_finished:
        outcome.say(start.message)
        return

    # Build, before the process group exists: it would time out while data is tokenized, and what is wrong is told sooner.
    task = build_task(recipe)
    config = load_config(recipe)
    tokenizer = load_tokenizer(recipe, config)
    data = prepare_data(recipe, task, tokenizer)
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
    evaluation_plan = EvaluationPlan(data.validation.lengths, *memory)

    model, optimizer, train_loader, evaluation_loader = accelerator.prepare(
        model,
        optimization.build_optimizer(model, recipe),
        build_loader(data.train, tokenizer, plan, recipe, accelerator),
        build_loader(data.validation, tokenizer, evaluation_plan, recipe, accelerator),
    )
    # The schedule is not prepared: accelerate would step it once per process.
    scheduler = optimization.build_scheduler(optimizer, recipe, num_steps)
    checkpointing.restore(accelerator, model, optimizer, scheduler, start)
    progress = start.progress

    if accelerator.is_main_process:
        run.create(resolved, strategy.describe_topology(accelerator))
    outcome.follow(run.status, progress.step)
    strategy.init_trackers(accelerator, resolved)
    milestones = Milestones(recipe, order.steps_per_epoch, num_steps)
    reporter = Reporter(run, accelerator, num_steps, order.steps_per_epoch, progress.step)
    reporter.say(start.message)
    reporter.say(describe_head(recipe, task))
    reporter.say(describe_plan(recipe, accelerator, num_steps, plan.micro_batches(0), parameters))

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
                progress.scheduler = scheduler.state_dict()
                checkpointing.save_checkpoint(accelerator, model, optimizer, progress, run, is_best)
                reporter.restart_clock()
            if milestones.stops_early(progress):
                reporter.say(f"No better {recipe.metric_for_best_model} for a while: stopped early.")
                break
        reporter.flush()

    # Save: the model, what it says of the validation data, and what came of it all.
    if evaluation is None:  # Resumed after the last step.
        evaluation = evaluate(accelerator, model, task, evaluation_loader)
    card = build_model_card(recipe, task, evaluation.metrics)
    checkpointing.save_final(accelerator, model, tokenizer, card, run.final)
    if accelerator.is_main_process:
        write_atomically(run.eval_predictions, format_predictions(evaluation, task))
    print_summary(reporter.console, run, task, evaluation, time.perf_counter() - started)
    accelerator.end_training()


if __name__ == "__main__":
    sys.exit(report_outcome(main, sys.argv[1:]))
