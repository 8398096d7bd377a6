"""The lesson that every reference way of training is given, and what it learned from it.

A reference proves something only if it is fed what Onecurve is fed: the same initial weights, the same tokens, the same
examples in each step. Those come from Onecurve's own recipe, prepared data and plan. Everything after that, the loss,
the gradients, clipping, AdamW, the schedule and the evaluation, is the business of each way alone.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from transformers import DataCollatorWithPadding

from onecurve.training.config import Recipe, load_recipe, parse_arguments
from onecurve.training.data.plan import Order
from onecurve.training.data.preparation import Split, prepare_data
from onecurve.training.models.loading import build_model, load_config
from onecurve.training.record.console import quiet_third_parties
from onecurve.training.schedule import count_steps
from onecurve.training.tasks import build_task
from onecurve.training.tasks.processors import TOKENIZER

LEARNED = "learned.json"


@dataclass(frozen=True)
class Lesson:
    """What a way of training is given.

    Attributes:
        recipe: the settings, as Onecurve reads them.
        model: the pretrained model with its new head; each lesson holds a fresh one.
        tokenizer: pads the batches.
        train: rows of input_ids, token_type_ids and labels, not padded.
        validation: likewise.
        batches: the rows of each step, in Onecurve's order, through all epochs.
        steps_per_epoch: how many of them visit each row once.
    """

    recipe: Recipe
    model: torch.nn.Module
    tokenizer: Any
    train: datasets.Dataset
    validation: datasets.Dataset
    batches: list[list[int]]
    steps_per_epoch: int

    @property
    def collate(self) -> Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]:
        """Pads rows to the longest of them, as the tutorial does."""
        collator: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]] = DataCollatorWithPadding(self.tokenizer)
        return collator

    @property
    def decayed_names(self) -> set[str]:
        """Names of the parameters that weight decay acts on: matrices and embeddings."""
        return {name for name, parameter in self.model.named_parameters() if parameter.ndim >= 2}

    @property
    def num_warmup_steps(self) -> int:
        """Steps of linear warm-up, rounded up as transformers does."""
        return self.recipe.num_warmup_steps or int(np.ceil(self.recipe.warmup_ratio * len(self.batches)))


@dataclass
class Learned:
    """What came of a lesson.

    Attributes:
        losses: of each step, before its update.
        grad_norms: of each step, before clipping; empty where a way does not tell.
        accuracy: share of the validation rows that were classified rightly after the last step.
        train_seconds: of the loop alone, without start, evaluation and save.
    """

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    accuracy: float = 0.0
    train_seconds: float = 0.0

    @classmethod
    def load(cls, folder: Path) -> Learned:
        """What a reference left behind in its folder."""
        return cls(**json.loads((folder / LEARNED).read_text(encoding="utf-8")))

    @classmethod
    def load_onecurve(cls, folder: Path) -> Learned:
        """What Onecurve left behind in its run directory."""
        lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        steps = [line for line in lines if line["event"] == "train"]
        return cls(
            losses=[line["loss"] for line in steps],
            grad_norms=[line["grad_norm"] for line in steps],
            accuracy=[line["eval_accuracy"] for line in lines if line["event"] == "eval"][-1],
            train_seconds=sum(line["tokens"] / line["tokens_per_second"] for line in steps),
        )

    def save(self, folder: Path) -> None:
        """Write it as `learned.json`."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / LEARNED).write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")


class Stopwatch:
    """Measures the seconds of a `with` block."""

    seconds = 0.0

    def __enter__(self) -> Stopwatch:
        self._started = time.perf_counter()
        return self

    def __exit__(self, *exception: object) -> None:
        self.seconds = time.perf_counter() - self._started


def largest_deviation(values: Sequence[float], references: Sequence[float]) -> float:
    """The largest relative difference between two curves of the same length."""
    left, right = np.asarray(values), np.asarray(references)
    if left.shape != right.shape:
        raise ValueError(f"curves of {len(values)} and {len(references)} steps can't be compared")
    return float(np.max(np.abs(left - right) / np.abs(right)))


def build_lesson(recipe: Recipe) -> Lesson:
    """Weights, tokens and order, from Onecurve's own functions."""
    task = build_task(recipe)
    config = load_config(recipe)
    tokenizer = TOKENIZER.load(recipe, config)
    data = prepare_data(recipe, task, tokenizer)
    order = Order(len(data.train), recipe.train_batch_size, recipe.seed, data.train.lengths, recipe.length_window)
    num_steps = count_steps(recipe, order.steps_per_epoch)
    return Lesson(
        recipe=recipe,
        model=build_model(recipe, config, task, tokenizer),
        tokenizer=tokenizer,
        train=_with_labels(data.train),
        validation=_with_labels(data.validation),
        batches=[order.global_batch(step).tolist() for step in range(num_steps)],
        steps_per_epoch=order.steps_per_epoch,
    )


def _with_labels(split: Split) -> datasets.Dataset:
    columns = {name: [row.tolist() for row in feature[:]] for name, feature in split.examples.items()}
    return datasets.Dataset.from_dict(columns)


def study(train: Callable[[Lesson], Learned], arguments: Sequence[str]) -> None:
    """The command of a way: takes the flags of training/run.py, leaves `learned.json` in `output_dir`."""
    quiet_third_parties()
    recipe = load_recipe(*parse_arguments(arguments)).recipe
    learned = train(build_lesson(recipe))
    if int(os.environ.get("RANK", "0")) == 0:
        learned.save(Path(recipe.output_dir))
        print(f"{Path(sys.argv[0]).stem}: {len(learned.losses)} steps, accuracy {learned.accuracy:.4f}")
