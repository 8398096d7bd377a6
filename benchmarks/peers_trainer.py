"""transformers.Trainer and trl.SFTTrainer on the first global batch of lessons, on the processes that were launched.

    python -m benchmarks.peers_trainer FOLDER texts completions        started by benchmarks.peers

Writes FOLDER/peers_PROCESSES.json: of each lesson, way and number of micro-batches the loss and the gradient norm.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from benchmarks.peers import BATCH_SIZE, TOPOLOGIES, build_flags
from benchmarks.references_lesson import Lesson, build_lesson
from benchmarks.references_trainer import PlannedOrder
from onecurve.training.config import load_recipe, parse_arguments
from onecurve.training.record.console import quiet_third_parties


class FirstStepRecorder(TrainerCallback):
    """Keeps the first step's loss and gradient norm, as they are logged."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_log(self, args: object, state: object, control: object, logs: dict[str, float], **others: object) -> None:
        """Called after each step, logging_steps being 1."""
        if "grad_norm" in logs:
            self.found = [float(logs["loss"]), float(logs["grad_norm"])]


def train(way: str, lesson: Lesson, accumulation: int, num_processes: int) -> list[float]:
    """One step."""
    kind, arguments_kind = (SFTTrainer, SFTConfig) if way == "SFTTrainer" else (Trainer, TrainingArguments)
    more: dict[str, Any] = {"max_length": None, "shuffle_dataset": False} if way == "SFTTrainer" else {}

    class Planned(kind):  # type: ignore[misc,valid-type]
        def _get_train_sampler(self, *arguments: object) -> PlannedOrder:
            return PlannedOrder(lesson)

    settings = arguments_kind(
        output_dir=str(Path(lesson.recipe.output_dir).parent / way),
        per_device_train_batch_size=BATCH_SIZE // (num_processes * accumulation),
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        ddp_backend="gloo" if num_processes > 1 else None,
        dataloader_pin_memory=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **more,
    )
    recorder = FirstStepRecorder()
    trainer = Planned(
        model=lesson.model,
        args=settings,
        train_dataset=lesson.train.select_columns(["input_ids", "labels"]),
        processing_class=lesson.tokenizer,
        # TRL has its own.
        data_collator=DataCollatorForSeq2Seq(lesson.tokenizer) if way == "Trainer" else None,
        callbacks=[recorder],
    )
    trainer.train()
    return recorder.found


def main(folder: Path, lessons: Sequence[str]) -> None:
    """Train every lesson in both ways, with every number of micro-batches."""
    quiet_third_parties()
    num_processes, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    found: dict[str, Any] = {}
    for name in lessons:
        recipe = load_recipe(*parse_arguments(build_flags(name, folder))).recipe
        for way in ("Trainer", "SFTTrainer"):
            for processes, accumulation in TOPOLOGIES:
                if processes == num_processes:
                    torch.manual_seed(0)
                    measured = train(way, build_lesson(recipe), accumulation, num_processes)
                    found.setdefault(name, {}).setdefault(way, {})[accumulation] = measured
    if rank == 0:
        (folder / f"peers_{num_processes}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
