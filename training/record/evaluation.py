"""Evaluation: each example once on any number of processes, the metrics those of a single process to the last bit."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from onecurve.training.atomic_files import write_atomically
from onecurve.training.data.columns import Array
from onecurve.training.data.layout import Layout
from onecurve.training.data.loading import Loader
from onecurve.training.data.plan import MicroBatch
from onecurve.training.data.preparation import Split
from onecurve.training.recovery.stops import StopFlag, StopRequested
from onecurve.training.tasks.base import Forward, Task

# What every evaluation finds of an example, beside the task's own results.
_INDEX, _STOP, _LOSS = "(index)", "(stop)", "(loss)"


@dataclass(frozen=True)
class EvaluationData:
    """A split to evaluate, and the prepared loader that visits each of its examples once, in batches of this layout."""

    split: Split
    loader: Loader
    layout: Layout


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        metrics: "eval_loss", "eval_accuracy", ... or "test_loss", ...; the loss alone where it is not finite.
        results: what the task found of each example, in the order of the data, by name.
    """

    metrics: dict[str, float]
    results: Mapping[str, Any]


def evaluate(
    accelerator: Accelerator,
    model: torch.nn.Module,
    task: Task,
    data: EvaluationData,
    prefix: str,
    stop_flag: StopFlag | None = None,
) -> Evaluation:
    """Run the model over every planned micro-batch and gather the results on all processes.

    Raises:
        StopRequested: on all processes, when one was asked to stop.
    """
    found: dict[str, list[Any]] = {}
    model.eval()
    try:
        for batch in data.loader:
            micro_batch = batch.pop("micro_batch")
            with torch.no_grad():
                forward = task.forward(model, batch, wants_results=True)
            is_asked = stop_flag is not None and stop_flag.is_raised()
            for name, values in _gather(accelerator, task, data, micro_batch, forward, is_asked):
                found.setdefault(name, []).append(values)
            if (found.pop(_STOP)[0] == 1).any():
                raise StopRequested
    finally:
        model.train()
    results = _put_in_order(found, len(data.split), task.ragged_results)
    losses = results.pop(_LOSS)
    if "row" in data.split.examples:
        results["row"] = data.split.examples["row"][:]
    metrics = {f"{prefix}_loss": float(np.sum(losses, dtype=np.float64) / np.sum(data.split.counts))}
    if math.isfinite(metrics[f"{prefix}_loss"]):  # Some metrics raise an error of NaN.
        metrics |= {f"{prefix}_{name}": value for name, value in task.compute_metrics(results).items()}
    return Evaluation(metrics, results)


def _gather(
    accelerator: Accelerator,
    task: Task,
    data: EvaluationData,
    micro_batch: MicroBatch,
    forward: Forward,
    is_asked: bool,
) -> Iterator[tuple[str, Any]]:
    """Results of the micro-batches of all processes: arrays [examples, ...], or lists of arrays where they are ragged."""
    losses = forward.losses
    assert losses is not None, "evaluation data has targets"
    # Processes hold micro-batches of different sizes: rows are padded to the largest, and a padding row, like the stand-in
    # of an empty micro-batch, has index -1.
    index = torch.full((len(losses),), -1) if micro_batch.is_empty else torch.as_tensor(micro_batch.indices)
    index = index.to(losses.device)
    own = {_INDEX: index, _STOP: torch.full_like(index, is_asked), _LOSS: losses, **forward.results}
    for name in task.ragged_results & own.keys():  # Its values one behind the other, wherever padding is.
        own[name] = torch.cat(data.layout.split(own[name], _count_tokens(data.split, micro_batch.indices)))
    padded = {
        name: accelerator.pad_across_processes(values.contiguous(), dim=0, pad_index=-1) for name, values in own.items()
    }
    gathered = {name: values.cpu().numpy() for name, values in accelerator.gather_for_metrics(padded).items()}
    of_process = gathered[_INDEX].reshape(accelerator.num_processes, -1)
    is_real = gathered[_INDEX] >= 0
    for name, values in gathered.items():
        if name in task.ragged_results:
            blocks = values.reshape(accelerator.num_processes, -1)
            yield name, [piece for block, indices in zip(blocks, of_process, strict=True)
                         for piece in _split(block, data.split, indices[indices >= 0])]  # fmt: skip
        else:
            yield name, values if name == _STOP else values[is_real]


def _split(values: Array, split: Split, indices: Array) -> list[Array]:
    """Cut values that stand one behind the other into those of each example, as long as its tokens."""
    ends = np.cumsum(_count_tokens(split, indices))
    return np.split(values[: ends[-1]], ends[:-1]) if len(ends) else []


def _count_tokens(split: Split, indices: Array) -> list[int]:
    return [len(tokens) for tokens in split.examples["input_ids"][indices]]


def _put_in_order(found: Mapping[str, list[Any]], num_examples: int, ragged: frozenset[str]) -> dict[str, Any]:
    """Results in the order of the data.

    Args:
        found: by name what each round of micro-batches has given.
    """
    indices = np.concatenate(found[_INDEX])
    order = np.argsort(indices)
    assert np.array_equal(indices[order], np.arange(num_examples)), "every example is evaluated exactly once"
    results: dict[str, Any] = {}
    for name, rounds in found.items():
        if name in ragged:
            rows = [row for values in rounds for row in values]
            results[name] = [rows[number] for number in order]
        elif name != _INDEX:
            results[name] = np.concatenate(rounds)[order]
    return results


def save_evaluation(evaluation: Evaluation, task: Task, predictions: Path, report: Path) -> None:
    """Write a line per example, and a report: the metrics, and the task's own."""
    write_atomically(predictions, format_predictions(evaluation, task))
    content = {"metrics": evaluation.metrics, **task.report(evaluation.results)}
    write_atomically(report, json.dumps(content, indent=2) + "\n")


def format_predictions(evaluation: Evaluation, task: Task) -> str:
    """The text of eval_predictions.jsonl: one line per example with index, label, prediction and score."""
    lines = (
        json.dumps({"index": index, **line}, ensure_ascii=False)
        for index, line in enumerate(task.describe_predictions(evaluation.results))
    )
    return "\n".join(lines) + "\n"
