"""Fine-tune a pretrained transformer: configure, build, train, save.

    accelerate launch --config_file accelerate_configs/cpu.yaml training/run.py --config training/recipes/demo.yaml
    accelerate launch --config_file accelerate_configs/multi_cpu.yaml training/run.py --config RECIPE.yaml --seed 7

The recipe says what is trained, the accelerate YAML where. The losses are the same on every topology.
"""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    # This file's own checkout or wheel, whatever else is installed; and not this folder, whose names are not for all.
    sys.path[0] = next(str(folder) for folder in Path(__file__).resolve().parents if (folder / "onecurve").is_dir())

from onecurve.training.outcome import Outcome, report_outcome  # isort: split

import torch

from onecurve.training.building import Training, build, shrink_micro_batches
from onecurve.training.config import load_recipe, parse_arguments
from onecurve.training.errors import Diverged, Preempted
from onecurve.training.models import optimization
from onecurve.training.parallel.launch import check_launch
from onecurve.training.parallel.micro_batch import begin_micro_batch
from onecurve.training.record.evaluation import Evaluation, evaluate, save_evaluation
from onecurve.training.record.reporter import build_model_card, print_evaluation, print_next, quiet_third_parties
from onecurve.training.recovery.out_of_memory import MicroBatchTooLarge, detect_out_of_memory
from onecurve.training.recovery.resumption import find_start
from onecurve.training.recovery.run_lock import RunLock
from onecurve.training.recovery.stops import StopRequested
from onecurve.training.run_directory import RunDirectory

# A rank was seen to hang while DDP's native parts were freed after a finished run: they are kept, and left to the system.
_KEPT: list[Training] = []


def main(arguments: Sequence[str], outcome: Outcome) -> None:
    """Configure, build, train, save."""
    started = time.perf_counter()
    quiet_third_parties()
    resolved = load_recipe(*parse_arguments(arguments))
    check_launch(resolved.recipe)
    run = RunDirectory.of(resolved.recipe)
    if resolved.eval_only:
        training = build(resolved, run, outcome)
        _KEPT.append(training)
        with training.watchdog:
            evaluate_only(training)
        return
    with RunLock(run) as lock:
        start = find_start(run, resolved)
        if start.is_finished:
            outcome.print_once(start.message)
            outcome.step = start.progress.step
            return
        training = build(resolved, run, outcome, start, lock)
        _KEPT.append(training)
        with training.watchdog, training.reporter, training.checkpoints:
            try:
                evaluation = train(training)
                save(training, evaluation)
            except StopRequested:
                stop(training)
            except Diverged as error:
                raise Diverged(f"{error}. {training.checkpoints.describe_last()}") from None
        print_evaluation(training.reporter.console, training.task, evaluation)
        print_next(training.reporter.console, run, time.perf_counter() - started)
        training.accelerator.end_training()


def train(training: Training) -> Evaluation:
    """Make every step that is left; a step for which the memory was too small starts again in smaller micro-batches."""
    while True:
        try:
            return make_steps(training)
        except MicroBatchTooLarge:
            pass
        shrink_micro_batches(training)  # Out here the error is gone, and with it the tensors that its frames held.


def make_steps(training: Training) -> Evaluation:
    """Make every step that is left, one micro-batch of this process at a time; returns the last evaluation."""
    recipe, accelerator, task = training.recipe, training.accelerator, training.task
    model, optimizer, scheduler = training.model, training.optimizer, training.scheduler
    progress, evaluation = training.progress, None
    losses: list[torch.Tensor] = []
    model.train()
    if progress.evaluation_is_due:  # Stopped in the middle of it.
        evaluation = conclude_step(training)
    is_over = training.milestones.stops_early(progress)  # Patience had ended before this start, or just now.
    for batch in () if is_over else training.train_loader:
        plan = batch.pop("plan")  # Where this micro-batch stands in its step, and what the step counts.
        gradient_scale = begin_micro_batch(accelerator, plan, recipe.seed)
        with accelerator.accumulate(model):
            with detect_out_of_memory():
                loss = task.loss_sum(model, batch) * plan.weight / plan.global_count
                accelerator.backward(loss * gradient_scale)
            losses.append(loss.detach())
            if accelerator.sync_gradients:
                grad_norm = optimization.clip_gradients(accelerator, model, recipe.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        if not plan.is_last:
            continue

        # The step is made. Summed over all processes: the mean loss of the global batch, and what one must tell the others.
        step_loss = torch.stack(losses).sum()
        is_asked = torch.full_like(step_loss, training.stop_flag.is_raised())
        has_failed = torch.full_like(step_loss, training.checkpoints.has_failed())
        sums = accelerator.reduce(torch.stack([step_loss, is_asked, has_failed]))
        training.reporter.log_step(plan, sums, grad_norm, scheduler.get_last_lr()[0])
        losses.clear()
        progress.step = training.outcome.step = plan.step + 1
        if not optimization.needs_metric(recipe):
            scheduler.step()
        evaluation = conclude_step(training) or evaluation
        if training.milestones.stops_early(progress):
            training.reporter.say(f"No better {recipe.metric_for_best_model} for a while: stopped early.")
            break
        if training.reporter.save_has_failed:
            training.checkpoints.wait()  # Raises, on all processes.
        if training.reporter.stop_is_agreed:
            raise StopRequested
    training.reporter.flush()
    if evaluation is None:  # Resumed after the last step.
        evaluation = evaluate(accelerator, model, task, training.evaluation_loader, "eval", training.stop_flag)
    return evaluation


def conclude_step(training: Training) -> Evaluation | None:
    """Evaluate and write a checkpoint, if they are due after this step."""
    progress, evaluation, is_best = training.progress, None, False
    if training.milestones.evaluates_after(progress.step):
        progress.evaluation_is_due = True
        accelerator, model, task = training.accelerator, training.model, training.task
        evaluation = evaluate(accelerator, model, task, training.evaluation_loader, "eval", training.stop_flag)
        progress.evaluation_is_due = False
        training.reporter.log_evaluation(progress.step, evaluation.metrics)
        is_best = training.milestones.record(progress, evaluation.metrics)
        if optimization.needs_metric(training.recipe):
            training.scheduler.step(evaluation.metrics["eval_loss"])
    if is_best or training.milestones.saves_after(progress.step):
        training.reporter.flush()
        with training.watchdog.slow_phase():
            training.checkpoints.save(progress, is_best)
        training.reporter.restart_clock()
    return evaluation


def stop(training: Training) -> None:
    """Write a checkpoint and end with exit code 75: the next start goes on from here."""
    training.reporter.flush()
    with training.watchdog.slow_phase():
        training.checkpoints.save(training.progress)
        training.checkpoints.wait()
    training.stop_flag.clear()
    raise Preempted(f"stopped after step {training.progress.step} as asked; start it again to go on")


def save(training: Training, evaluation: Evaluation) -> None:
    """Write the final model, and what it says of the validation and the test data."""
    run, task, accelerator = training.run, training.task, training.accelerator
    card = build_model_card(training.recipe, task, evaluation.metrics)
    with training.watchdog.slow_phase():
        training.checkpoints.save_final(training.tokenizer, card, run.final)
    if accelerator.is_main_process:
        save_evaluation(evaluation, task, run.eval_predictions, run.eval_report)
    if training.test_loader is not None:
        test = evaluate(accelerator, training.model, task, training.test_loader, "test", training.stop_flag)
        training.reporter.log_evaluation(training.progress.step, test.metrics, event="test")
        if accelerator.is_main_process:
            save_evaluation(test, task, run.test_predictions, run.test_report)


def evaluate_only(training: Training) -> None:
    """Evaluate what was trained on the test data, or else on the validation data; trains nothing."""
    run, accelerator, model, task = training.run, training.accelerator, training.model, training.task
    is_test = training.test_loader is not None
    loader = training.test_loader or training.evaluation_loader
    try:
        evaluation = evaluate(accelerator, model, task, loader, "test" if is_test else "eval", training.stop_flag)
    except StopRequested:
        raise Preempted("stopped as asked; nothing is written, start it again to evaluate") from None
    if accelerator.is_main_process:
        names = (run.test_predictions, run.test_report) if is_test else (run.eval_predictions, run.eval_report)
        save_evaluation(evaluation, task, *names)
    print_evaluation(training.reporter.console, task, evaluation)
    accelerator.end_training()


if __name__ == "__main__":
    exit_code = report_outcome(main, sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
