"""Fine-tune a pretrained transformer: configure, build, train, save.

    accelerate launch --config_file accelerate_configs/cpu.yaml training/run.py --config training/recipes/demo.yaml
    accelerate launch --config_file accelerate_configs/multi_cpu.yaml training/run.py --config RECIPE.yaml --seed 7

The recipe says what is trained, the accelerate YAML where. The losses are the same on every topology.
"""

import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    # This file's own checkout or wheel, whatever else is installed; and not this folder, whose names are not for all.
    sys.path[0] = next(str(folder) for folder in Path(__file__).resolve().parents if (folder / "onecurve").is_dir())

from onecurve.training.outcome import Outcome, end_process, report_outcome  # isort: split

import torch

from onecurve.training.building import build
from onecurve.training.config import load_recipe, parse_arguments
from onecurve.training.errors import Diverged, Preempted
from onecurve.training.lasting_output import protect_output
from onecurve.training.models import optimization
from onecurve.training.models.failures import explain_model_errors
from onecurve.training.parallel.agreement import ask_main_process
from onecurve.training.parallel.launch import check_launch
from onecurve.training.parallel.loss_scale import check_updates
from onecurve.training.parallel.micro_batch import begin_micro_batch
from onecurve.training.record.console import print_evaluation, print_next, quiet_third_parties
from onecurve.training.record.evaluation import Evaluation, evaluate, save_evaluation
from onecurve.training.record.model_card import build_model_card
from onecurve.training.record.samples import write_samples
from onecurve.training.recovery.best_model import load_best_model
from onecurve.training.recovery.merging import write_merged
from onecurve.training.recovery.out_of_memory import MicroBatchTooLarge, detect_out_of_memory
from onecurve.training.recovery.resumption import find_start
from onecurve.training.recovery.run_lock import RunLock
from onecurve.training.recovery.stops import StopRequested
from onecurve.training.run_directory import RunDirectory
from onecurve.training.session import Session, shrink_micro_batches

# A rank was seen to hang while DDP's native parts were freed after a finished run: they are kept until the process exits.
_KEPT: list[Session] = []


def main(arguments: Sequence[str], outcome: Outcome) -> None:
    """Configure, build, train, save."""
    started = time.perf_counter()
    quiet_third_parties()
    resolved = load_recipe(*parse_arguments(arguments))
    outcome.print_once(check_launch(resolved.recipe))
    run = RunDirectory.of(resolved.recipe)
    if resolved.eval_only:
        session = build(resolved, run, outcome)
        _KEPT.append(session)
        with session.watchdog:
            evaluate_only(session)
        return
    with RunLock(run) as lock:
        start = find_start(run, resolved)
        if start.is_finished:
            outcome.print_once(start.message)
            outcome.step = start.progress.step
            return
        session = build(resolved, run, outcome, start, lock)
        _KEPT.append(session)
        with session.watchdog, session.reporter, session.checkpoints:
            try:
                evaluation = train(session)
                save(session, evaluation)
            except StopRequested:
                stop(session)
            except Diverged as error:
                raise Diverged(f"{error}. {session.checkpoints.describe_last()}") from None
        print_evaluation(session.reporter.console, session.task, evaluation)
        print_next(session.reporter.console, session.task, run, time.perf_counter() - started)
        session.accelerator.end_training()


def train(session: Session) -> Evaluation:
    """Make every step that is left, return to the best model if one was asked for, and evaluate what is not evaluated.

    A step that runs out of memory starts again in smaller micro-batches.
    """
    session.model.train()
    evaluation = None
    if not session.progress.step:
        sample(session)  # Before, for who wants to see what the training changed.
        session.reporter.restart_clock()
    if session.progress.evaluation_is_due:  # The run was stopped in the middle of it.
        evaluation = conclude_step(session)
    while not session.milestones.stops_early(session.progress):
        try:
            evaluation = make_steps(session) or evaluation
            break
        except MicroBatchTooLarge:
            pass
        shrink_micro_batches(session)  # Outside of `except` the error and the tensors that its frames held are freed.
    session.reporter.flush()
    check_updates(session.accelerator, session.optimizer)
    if return_to_best(session):
        evaluation = None
    return evaluation or evaluate_validation(session)


def make_steps(session: Session) -> Evaluation | None:
    """Make every step that is left, one micro-batch of this process at a time; returns the last evaluation."""
    recipe, accelerator, task = session.recipe, session.accelerator, session.task
    model, optimizer, scheduler = session.model, session.optimizer, session.scheduler
    progress, evaluation = session.progress, None
    losses: list[torch.Tensor] = []
    for batch in session.train_loader:
        micro_batch = batch.pop("micro_batch")  # Where it stands in its step, and what the whole step counts.
        gradient_scale = begin_micro_batch(accelerator, micro_batch, recipe)
        with accelerator.accumulate(model):
            is_first = micro_batch.step == session.plan.start_step
            with explain_model_errors(recipe.model_name_or_path, is_first), detect_out_of_memory():
                loss = task.loss_sum(model, batch) * micro_batch.weight / micro_batch.global_count
                accelerator.backward(loss * gradient_scale)
            losses.append(loss.detach())
            if accelerator.sync_gradients:
                grad_norm = optimization.clip_gradients(accelerator, model, recipe.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        if not micro_batch.is_last:
            continue

        # The step is made. Summed over all processes: the mean loss of the global batch, and what only one may know.
        step_loss = torch.stack(losses).sum()
        is_asked = torch.full_like(step_loss, session.stop_flag.is_raised())
        has_failed = torch.full_like(step_loss, session.checkpoints.has_failed())
        sums = accelerator.reduce(torch.stack([step_loss, is_asked, has_failed]))
        session.reporter.log_step(micro_batch, sums, grad_norm, scheduler.get_last_lr()[0])
        losses.clear()
        progress.step = session.outcome.step = micro_batch.step + 1
        if not optimization.needs_metric(recipe):
            scheduler.step()
        evaluation = conclude_step(session) or evaluation
        if session.milestones.stops_early(progress):
            session.reporter.say(f"{recipe.metric_for_best_model} has not improved for a while: stopped early.")
            break
        if session.reporter.save_has_failed:
            session.checkpoints.wait()  # Raises, on all processes.
        if session.reporter.stop_is_agreed:
            raise StopRequested
    return evaluation


def conclude_step(session: Session) -> Evaluation | None:
    """Evaluate and write a checkpoint, if they are due after this step."""
    progress, evaluation, is_best = session.progress, None, False
    if session.milestones.evaluates_after(progress.step):
        progress.evaluation_is_due = True
        evaluation = evaluate_validation(session)
        progress.evaluation_is_due = False
        session.reporter.log_evaluation(progress.step, evaluation.metrics)
        is_best = session.milestones.record(progress, evaluation.metrics)
        if optimization.needs_metric(session.recipe):
            session.scheduler.step(evaluation.metrics["eval_loss"])
    if is_best or session.milestones.saves_after(progress.step):
        session.reporter.flush()
        with session.watchdog.slow_phase():
            session.checkpoints.save(progress, is_best)
        session.reporter.restart_clock()
    return evaluation


def return_to_best(session: Session) -> bool:
    """With metric_for_best_model, end with the best model; returns whether the model is another now."""
    accelerator, model, progress = session.accelerator, session.model, session.progress
    with session.watchdog.slow_phase():
        has_changed, line = load_best_model(accelerator, model, session.checkpoints, progress)
    session.reporter.say(line)
    return has_changed


def evaluate_validation(session: Session) -> Evaluation:
    """Evaluate the validation data, and write samples of what the model makes of it."""
    evaluation = evaluate(
        session.accelerator, session.model, session.task, session.validation, "eval", session.stop_flag
    )
    sample(session)
    return evaluation


def sample(session: Session) -> None:
    """Write what the model now makes of a few validation examples, if the recipe asks for samples."""
    accelerator, model, task = session.accelerator, session.model, session.task
    with session.watchdog.slow_phase():
        examples, step = session.validation.split.examples, session.progress.step
        write_samples(accelerator, model, task, examples, session.processor, session.run, step)


def stop(session: Session) -> None:
    """Write a checkpoint and end with exit code 75: the next start resumes from it."""
    session.reporter.flush()
    with session.watchdog.slow_phase():
        session.checkpoints.save(session.progress)
        session.checkpoints.wait()
    session.stop_flag.clear()
    raise Preempted(f"stopped after step {session.progress.step} as asked; start it again to go on")


def save(session: Session, evaluation: Evaluation) -> None:
    """Evaluate the test data, and write the final model and what it predicts."""
    run, task, accelerator = session.run, session.task, session.accelerator
    test = None
    if session.test is not None:  # Before the model is written: a stop here still finds the state that it has to write.
        test = evaluate(accelerator, session.model, task, session.test, "test", session.stop_flag)
        session.reporter.log_evaluation(session.progress.step, test.metrics, event="test")
    card = build_model_card(session.recipe, task, evaluation.metrics)
    with session.watchdog.slow_phase():
        session.checkpoints.save_final(session.processor, card, run.final)
        if session.recipe.merge_adapter:
            examples = session.validation.split.examples
            merge = partial(write_merged, session.recipe, run.final, run.merged, examples)
            session.reporter.say(ask_main_process(merge))
    if accelerator.is_main_process:
        save_evaluation(evaluation, task, session.processor, run.eval_predictions, run.eval_report)
        if test is not None:
            save_evaluation(test, task, session.processor, run.test_predictions, run.test_report)


def evaluate_only(session: Session) -> None:
    """Evaluate a trained model on the test data, or else on the validation data, without training."""
    run, accelerator, task = session.run, session.accelerator, session.task
    data, prefix, files = session.validation, "eval", (run.eval_predictions, run.eval_report)
    if session.test is not None:
        data, prefix, files = session.test, "test", (run.test_predictions, run.test_report)
    try:
        evaluation = evaluate(accelerator, session.model, task, data, prefix, session.stop_flag)
    except StopRequested:
        raise Preempted("stopped as asked; nothing is written, start it again to evaluate") from None
    if accelerator.is_main_process:
        save_evaluation(evaluation, task, session.processor, *files)
    print_evaluation(session.reporter.console, task, evaluation)
    accelerator.end_training()


if __name__ == "__main__":
    protect_output()
    end_process(report_outcome(main, sys.argv[1:]))
