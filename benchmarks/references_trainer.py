"""transformers.Trainer as the tutorial uses it, fed in Onecurve's order.

    python -m benchmarks.references_trainer --config training/recipes/demo.yaml --output_dir runs/references/trainer
    accelerate launch --config_file accelerate_configs/multi_cpu.yaml -m benchmarks.references_trainer --config ...

Accumulation is derived as Onecurve derives it: train_batch_size / (per_device_batch_size x processes).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainingArguments

from benchmarks.references_lesson import Learned, Lesson, Stopwatch, study


class PlannedOrder(torch.utils.data.Sampler[int]):
    """The rows of each epoch in Onecurve's order. Trainer cuts them into batches and deals these to its processes."""

    def __init__(self, lesson: Lesson) -> None:
        size = lesson.steps_per_epoch
        self._epochs = [lesson.batches[start : start + size] for start in range(0, len(lesson.batches), size)]
        self._num_rows = len(lesson.train)
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Trainer tells which epoch begins."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return (row for batch in self._epochs[self._epoch] for row in batch)

    def __len__(self) -> int:
        return self._num_rows


class PlannedTrainer(Trainer):
    """Trainer with its sampler exchanged, and nothing else."""

    def __init__(self, *, order: PlannedOrder, **options: Any) -> None:
        super().__init__(**options)
        self._order = order

    def _get_train_sampler(self, train_dataset: object = None) -> PlannedOrder:
        return self._order


class CurveRecorder(TrainerCallback):
    """Keeps each step's loss and gradient norm, as Trainer logs them."""

    def __init__(self, learned: Learned) -> None:
        self._learned = learned

    def on_log(self, args: object, state: object, control: object, logs: dict[str, float], **others: object) -> None:
        """Called by Trainer after each step, logging_steps being 1."""
        if "grad_norm" in logs:
            self._learned.losses.append(logs["loss"])
            self._learned.grad_norms.append(logs["grad_norm"])


def measure_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """The tutorial's compute_metrics."""
    return {"accuracy": float(np.mean(prediction.predictions.argmax(axis=-1) == prediction.label_ids))}


def build_surroundings(num_processes: int) -> dict[str, Any]:
    """What every comparison asks of Trainer beside the recipe: a CPU, each step logged, nothing kept or drawn."""
    return {
        "use_cpu": True,
        "ddp_backend": "gloo" if num_processes > 1 else None,
        "dataloader_pin_memory": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def build_arguments(lesson: Lesson) -> TrainingArguments:
    """The recipe in Trainer's words."""
    recipe = lesson.recipe
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    micro_batch_size = min(recipe.per_device_batch_size, recipe.train_batch_size // num_processes)
    return TrainingArguments(
        output_dir=recipe.output_dir,
        per_device_train_batch_size=micro_batch_size,
        per_device_eval_batch_size=recipe.per_device_batch_size,
        gradient_accumulation_steps=recipe.train_batch_size // (micro_batch_size * num_processes),
        max_steps=len(lesson.batches),
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.lr_scheduler_type,
        warmup_steps=lesson.num_warmup_steps,
        weight_decay=recipe.weight_decay,
        adam_beta1=recipe.adam_beta1,
        adam_beta2=recipe.adam_beta2,
        adam_epsilon=recipe.adam_epsilon,
        max_grad_norm=recipe.max_grad_norm,
        seed=recipe.seed,
        **build_surroundings(num_processes),
    )


def train(lesson: Lesson) -> Learned:
    """Train and evaluate on as many processes as were launched."""
    learned = Learned()
    callbacks: Sequence[TrainerCallback] = [CurveRecorder(learned)]
    trainer = PlannedTrainer(
        order=PlannedOrder(lesson),
        model=lesson.model,
        args=build_arguments(lesson),
        train_dataset=lesson.train,
        eval_dataset=lesson.validation,
        data_collator=lesson.collate,
        compute_metrics=measure_accuracy,
        callbacks=callbacks,
    )
    with Stopwatch() as stopwatch:
        trainer.train()
    learned.train_seconds = stopwatch.seconds
    learned.accuracy = trainer.evaluate()["eval_accuracy"]
    return learned


if __name__ == "__main__":
    study(train, sys.argv[1:])
