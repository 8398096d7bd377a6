"""From planned micro-batches to the tensors of one process."""

from __future__ import annotations

import signal
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from onecurve.training.data.layout import Collator, Layout
from onecurve.training.data.permutation import Indices
from onecurve.training.data.plan import EvaluationPlan, MicroBatch, TrainingPlan
from onecurve.training.data.preparation import Split
from onecurve.training.launch_protocol import STOP_SIGNALS
from onecurve.training.process import count_local_cores
from onecurve.training.recipe import Recipe
from onecurve.training.tasks.base import Task

Loader = DataLoader[dict[str, Any]]


def draw_features(split: Split, task: Task, indices: Indices, epoch: int) -> dict[str, Any]:
    """What a batch of some examples carries in an epoch, by feature: an array [examples, ...] or a list of arrays."""
    features = {name: feature[indices] for name, feature in split.examples.items()}
    drawn = task.draw(features, indices, epoch)
    return {name: values for name, values in drawn.items() if name not in task.unbatched_features}


class PlannedExamples(torch.utils.data.Dataset[dict[str, Any]]):
    """Turns a planned micro-batch into tensors, and passes the micro-batch itself on."""

    def __init__(self, split: Split, task: Task, processor: Any, layout: Layout) -> None:
        self.split = split
        self._task = task
        self._collator = Collator(task, processor, layout)

    def __len__(self) -> int:
        return len(self.split)

    def __getitems__(self, micro_batch: MicroBatch) -> dict[str, Any]:
        """The tensors of one micro-batch, by feature, and "micro_batch"."""
        batched = draw_features(self.split, self._task, micro_batch.indices, micro_batch.epoch)
        placement = self._collator.describe_placement(batched)
        return {**self._collator(batched), "micro_batch": replace(micro_batch, placement=placement)}


def _pass_through(batch: dict[str, Any]) -> dict[str, Any]:
    return batch


def _ignore_stop_signals(worker: int) -> None:
    """Torch's agent and terminals signal a rank and its workers: a worker that died of it would fail the rank's save.

    The rank ends its workers without a signal, and they end by themselves when the rank has exited.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def count_workers(recipe: Recipe, task: Task, device_type: str) -> int:
    """Loader processes of this rank: the recipe's number, or what dataloader_num_workers: auto stands for."""
    if recipe.dataloader_num_workers != "auto":
        return recipe.dataloader_num_workers
    if not task.batches_take_long or device_type == "cpu":  # On a CPU they would take its cores from the training.
        return 0
    return min(8, max(1, count_local_cores()))


def build_loader(
    split: Split,
    task: Task,
    processor: Any,
    plan: TrainingPlan | EvaluationPlan,
    recipe: Recipe,
    accelerator: Accelerator,
    layout: Layout,
) -> Loader:
    """A loader over planned micro-batches, to be prepared: accelerate deals micro-batch i to process i mod P."""
    return DataLoader(
        PlannedExamples(split, task, processor, layout),
        batch_sampler=plan,  # type: ignore[arg-type]  # yields micro-batches, not lists of numbers
        collate_fn=_pass_through,  # type: ignore[arg-type]  # the data set collates: it alone has the micro-batch
        num_workers=count_workers(recipe, task, accelerator.device.type),
        worker_init_fn=_ignore_stop_signals,
        pin_memory=accelerator.device.type == "cuda",
        # A loader draws a seed when it starts; from its own generator, or dropout's numbers would depend on how often.
        generator=torch.Generator().manual_seed(recipe.seed),
    )


def build_evaluation_plan(split: Split, recipe: Recipe, num_processes: int, layout: Layout) -> EvaluationPlan:
    """The plan that visits each example of a split once."""
    sizes = recipe.per_device_batch_size, recipe.per_device_batch_tokens
    return EvaluationPlan(split.lengths, num_processes, *sizes, layout.is_packed)
