"""Trainer, trl's SFTTrainer and the loop of accelerate's examples on the lessons of `benchmarks.conformance`.

python -m benchmarks.conformance_peers FOLDER STEPS        started by benchmarks.conformance, on 1 and on 2 processes
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    EvalPrediction,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_scheduler,
)

from benchmarks.conformance_alignment import VARIANTS, build_alignment, name_losses
from benchmarks.conformance_curve import (
    BATCH_SIZE,
    LESSONS,
    TOPOLOGIES,
    Curve,
    build_settings,
    measure_eval_loss,
    name_curve,
)
from benchmarks.references_lesson import Lesson, build_lesson
from benchmarks.references_trainer import PlannedOrder, build_surroundings
from onecurve.training.config import load_recipe, parse_arguments
from onecurve.training.record.console import quiet_third_parties
from tools.trainings import to_flags

_PLACES = ("row", "prompt_length")


def find_ways() -> list[str]:
    """Those of the peers that are installed."""
    return ["Trainer", "accelerate", *(["SFTTrainer"] if importlib.util.find_spec("trl") else [])]


class _Recorder(TrainerCallback):
    """Keeps what Trainer logs of each step."""

    def __init__(self, curve: Curve) -> None:
        self._curve = curve

    def on_log(self, args: object, state: object, control: object, logs: dict[str, float], **others: object) -> None:
        """Called after each step, logging_steps being 1."""
        if "grad_norm" in logs:
            self._curve.losses.append(float(logs["loss"]))
            self._curve.grad_norms.append(float(logs["grad_norm"]))
            self._curve.rates.append(float(logs["learning_rate"]))


def build_trainer(way: str, lesson: Lesson, accumulation: int, curve: Curve, **more: Any) -> Any:
    """Trainer or SFTTrainer, fed in Onecurve's order.

    Args:
        curve: what is logged of each step is added to it.
        more: settings that are others than a whole training's.
    """
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    kind, arguments_kind = Trainer, TrainingArguments
    if way == "SFTTrainer":
        trl = importlib.import_module("trl")
        kind, arguments_kind = trl.SFTTrainer, trl.SFTConfig
        more |= {"max_length": None, "shuffle_dataset": False, "gradient_checkpointing": False, "bf16": False}

    class Planned(kind):  # type: ignore[misc,valid-type]
        def _get_train_sampler(self, *arguments: object) -> PlannedOrder:
            return PlannedOrder(lesson)

    arguments = arguments_kind(
        output_dir=lesson.recipe.output_dir + way,
        per_device_train_batch_size=BATCH_SIZE // (num_processes * accumulation),
        per_device_eval_batch_size=BATCH_SIZE,
        gradient_accumulation_steps=accumulation,
        learning_rate=lesson.recipe.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=0,
        max_grad_norm=lesson.recipe.max_grad_norm,
        **(build_surroundings(num_processes) | {"max_steps": len(lesson.batches)} | more),
    )
    return Planned(
        model=lesson.model,
        args=arguments,
        train_dataset=_drop_places(lesson.train),
        eval_dataset=_drop_places(lesson.validation),
        processing_class=lesson.tokenizer,
        data_collator=None if way == "SFTTrainer" else _choose_collator(lesson),
        callbacks=[_Recorder(curve)],
        **({} if way == "SFTTrainer" else {"compute_metrics": _count, "preprocess_logits_for_metrics": _pick_best}),
    )


def _count(prediction: EvalPrediction) -> dict[str, float]:
    return {"count": len(prediction.label_ids)}


def _pick_best(logits: Any, labels: object) -> torch.Tensor:
    """Whole logits of a vocabulary are not gathered."""
    best: torch.Tensor = (logits[0] if isinstance(logits, tuple) else logits).argmax(dim=-1)
    return best


def _drop_places(rows: Any) -> Any:
    return rows.select_columns([name for name in rows.column_names if name not in _PLACES])


def _choose_collator(lesson: Lesson) -> Any:
    if isinstance(lesson.train[0]["labels"], list):
        return DataCollatorForSeq2Seq(lesson.tokenizer)
    return DataCollatorWithPadding(lesson.tokenizer)


def train_with_trainer(way: str, lesson: Lesson, accumulation: int, is_broken: bool = False) -> Curve:
    """Train and evaluate.

    Args:
        is_broken: whether the model is not given the step's number of targets, as transformers' own check breaks it.
    """
    curve = Curve()
    trainer = build_trainer(way, lesson, accumulation, curve)
    trainer.model_accepts_loss_kwargs = trainer.model_accepts_loss_kwargs and not is_broken
    trainer.train()
    metrics = trainer.evaluate()
    curve.eval_loss, curve.num_evaluated = metrics["eval_loss"], int(metrics.get("eval_count", len(lesson.validation)))
    curve.true_eval_loss = measure_eval_loss(_unwrap(trainer.model), list(_drop_places(lesson.validation)))
    return curve


def _unwrap(model: Any) -> Any:
    return getattr(model, "module", model)


def train_with_accelerate(lesson: Lesson, accumulation: int) -> Curve:
    """The loop of accelerate's examples: `accumulate`, the model's own loss, `gather_for_metrics`."""
    curve = Curve()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    size, collate = BATCH_SIZE // (accelerator.num_processes * accumulation), _choose_collator(lesson)
    order = PlannedOrder(lesson)
    loader = torch.utils.data.DataLoader(_drop_places(lesson.train), size, sampler=order, collate_fn=collate)
    held_out = torch.utils.data.DataLoader(_drop_places(lesson.validation), BATCH_SIZE, collate_fn=collate)
    optimizer = torch.optim.AdamW(lesson.model.parameters(), lr=lesson.recipe.learning_rate, weight_decay=0.0)
    # As the examples have it: a prepared schedule advances once for each process.
    num_steps = len(lesson.batches) * accelerator.num_processes
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=num_steps)
    model, optimizer, loader, held_out, scheduler = accelerator.prepare(
        lesson.model, optimizer, loader, held_out, scheduler
    )
    model.train()
    for losses, grad_norm, rate in _make_steps(accelerator, model, optimizer, scheduler, loader, order, lesson):
        gathered = accelerator.gather(torch.stack(losses))
        curve.losses.append(float(gathered.mean()))
        curve.grad_norms.append(grad_norm)
        curve.rates.append(rate)
    model.eval()
    found, num_evaluated = [], 0
    for batch in held_out:
        with torch.no_grad():
            loss = model(**batch).loss
        found.append(accelerator.gather_for_metrics(loss.repeat(len(batch["labels"]))))
        num_evaluated += len(accelerator.gather_for_metrics(batch["labels"].reshape(len(batch["labels"]), -1)[:, 0]))
    curve.eval_loss, curve.num_evaluated = float(torch.cat(found).mean()), num_evaluated
    curve.true_eval_loss = measure_eval_loss(_unwrap(model), list(_drop_places(lesson.validation)))
    return curve


def _make_steps(
    accelerator: Accelerator,
    model: Any,
    optimizer: Any,
    scheduler: Any,
    loader: Any,
    order: PlannedOrder,
    lesson: Lesson,
) -> Iterator[tuple[list[torch.Tensor], float, float]]:
    """Losses of this process's micro-batches, gradient norm and learning rate of each step."""
    step, losses = 0, []
    for epoch in range(-(-len(lesson.batches) // lesson.steps_per_epoch)):
        order.set_epoch(epoch)
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                losses.append(loss.detach())
                accelerator.backward(loss)
                rate = scheduler.get_last_lr()[0]
                if accelerator.sync_gradients:
                    grad_norm = float(accelerator.clip_grad_norm_(model.parameters(), lesson.recipe.max_grad_norm))
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                yield losses, grad_norm, rate
                losses, step = [], step + 1
                if step == len(lesson.batches):
                    return


def train_aligned(folder: Path) -> None:
    """The variants of transformers' accumulation rule, in every way; accelerate's loop has the fault by itself."""
    recipe = load_recipe(*parse_arguments(to_flags(build_alignment(folder)))).recipe
    for way in find_ways():
        for variant, (accumulation, is_broken) in VARIANTS.items():
            if way == "accelerate" and is_broken:
                continue
            torch.manual_seed(0)
            lesson = build_lesson(recipe)
            if way == "accelerate":
                curve = train_with_accelerate(lesson, accumulation)
            else:
                curve = train_with_trainer(way, lesson, accumulation, is_broken)
            curve.save(folder / name_losses(way, variant))
            _forget()


def _forget() -> None:
    for state in (AcceleratorState, GradientState):
        state._reset_state()
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        PartialState._reset_state()


def main(folder: Path, num_steps: int) -> None:
    """Train every lesson in every way on the topologies of as many processes."""
    quiet_third_parties()
    num_processes, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    for name in LESSONS:
        recipe = load_recipe(*parse_arguments(to_flags(build_settings(name, folder, num_steps)))).recipe
        for way in find_ways():
            if way == "SFTTrainer" and name == "classifier":
                continue
            for processes, accumulation in TOPOLOGIES:
                if processes != num_processes:
                    continue
                np.random.seed(0)
                torch.manual_seed(0)
                lesson = build_lesson(recipe)
                if way == "accelerate":
                    curve = train_with_accelerate(lesson, accumulation)
                else:
                    curve = train_with_trainer(way, lesson, accumulation)
                if rank == 0:
                    curve.save(folder / name_curve(way, name, num_processes, accumulation))
                _forget()
    if num_processes == 1:
        train_aligned(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
