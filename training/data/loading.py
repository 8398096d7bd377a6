"""From planned micro-batches to the tensors of one process."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from onecurve.training.data.columns import Array
from onecurve.training.data.plan import EvaluationPlan, MicroBatch, TrainingPlan
from onecurve.training.data.preparation import Split
from onecurve.training.launch_protocol import STOP_SIGNALS
from onecurve.training.recipe import Recipe
from onecurve.training.tasks.base import Task

Loader = DataLoader[dict[str, Any]]


class PlannedExamples(torch.utils.data.Dataset[dict[str, Any]]):
    """Turns a planned micro-batch into tensors, and passes the micro-batch itself on."""

    def __init__(self, split: Split, task: Task, tokenizer: Any) -> None:
        self.split = split
        self._collator = Collator(task, tokenizer)

    def __len__(self) -> int:
        return len(self.split)

    def __getitems__(self, micro_batch: MicroBatch) -> dict[str, Any]:
        """The tensors of one micro-batch, by feature, and "micro_batch"."""
        features = {
            name: feature[micro_batch.indices] for name, feature in self.split.examples.items() if name != "row"
        }
        return {**self._collator(features), "micro_batch": micro_batch}


class Collator:
    """Examples side by side: ragged features padded to the longest, dense ones stacked."""

    def __init__(self, task: Task, tokenizer: Any) -> None:
        self._pad_values = task.pad_values(tokenizer)
        self._pads_left = tokenizer.padding_side == "left"

    def __call__(self, features: Mapping[str, Array | Sequence[Any]]) -> dict[str, torch.Tensor]:
        """Tensors of some examples.

        Args:
            features: of each an array [examples, ...] or a list of one-dimensional sequences.

        Returns:
            The same, [examples, ...] or [examples, longest], and "attention_mask" [examples, longest] beside "input_ids".
        """
        batch = {}
        for name, values in features.items():
            if isinstance(values, np.ndarray):
                batch[name] = torch.from_numpy(np.array(values))
            else:
                batch[name] = self._pad(values, self._pad_values.get(name, 0))
        if "input_ids" in features:
            batch["attention_mask"] = self._pad([np.ones(len(row), dtype=np.int64) for row in features["input_ids"]], 0)
        return batch

    def _pad(self, rows: Sequence[Any], value: int) -> torch.Tensor:
        is_real = any(np.asarray(row).dtype.kind == "f" for row in rows)
        longest = max(map(len, rows))
        padded = np.full((len(rows), longest), value, dtype=np.float32 if is_real else np.int64)
        for target, row in zip(padded, rows, strict=True):
            if self._pads_left:
                target[longest - len(row) :] = row
            else:
                target[: len(row)] = row
        return torch.from_numpy(padded)


def _pass_through(batch: dict[str, Any]) -> dict[str, Any]:
    return batch


def _ignore_stop_signals(worker: int) -> None:
    """Torch's agent and terminals signal a rank and its workers: a worker that died of it would fail the rank's save.

    The rank ends its workers without a signal, and they end by themselves when the rank has exited.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def build_loader(
    split: Split,
    task: Task,
    tokenizer: Any,
    plan: TrainingPlan | EvaluationPlan,
    recipe: Recipe,
    accelerator: Accelerator,
) -> Loader:
    """A loader over planned micro-batches, to be prepared: accelerate deals micro-batch i to process i mod P."""
    return DataLoader(
        PlannedExamples(split, task, tokenizer),
        batch_sampler=plan,  # type: ignore[arg-type]  # yields micro-batches, not lists of numbers
        collate_fn=_pass_through,  # type: ignore[arg-type]  # the data set collates: it alone has the micro-batch
        num_workers=recipe.dataloader_num_workers,
        worker_init_fn=_ignore_stop_signals,
        pin_memory=accelerator.device.type == "cuda",
        # A loader draws a seed when it starts; from its own generator, or dropout's numbers would depend on how often.
        generator=torch.Generator().manual_seed(recipe.seed),
    )


def build_evaluation_plan(split: Split, recipe: Recipe, num_processes: int) -> EvaluationPlan:
    """The plan that visits each example of a split once."""
    return EvaluationPlan(split.lengths, num_processes, recipe.per_device_batch_size, recipe.per_device_batch_tokens)
