"""Evaluation: each example once on any number of processes, the metrics those of a single process to the last bit."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from onecurve.training.errors import write_atomically
from onecurve.training.recovery.stops import StopFlag, StopRequested
from onecurve.training.tasks import TextClassification


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        metrics: "eval_loss", "eval_accuracy", ... or "test_loss", ...; the loss alone where it is not finite.
        labels: [examples, ...] in the order of the data.
        predictions: [examples, ...] likewise.
        scores: [examples, ...] likewise.
    """

    metrics: dict[str, float]
    labels: NDArray[Any]
    predictions: NDArray[Any]
    scores: NDArray[Any]


def evaluate(
    accelerator: Accelerator,
    model: torch.nn.Module,
    task: TextClassification,
    loader: DataLoader[dict[str, Any]],
    prefix: str,
    stop_flag: StopFlag | None = None,
) -> Evaluation:
    """Run the model over every planned micro-batch and gather the results on all processes.

    Raises:
        StopRequested: on all processes, when one was asked to stop.
    """
    metrics = task.build_metrics()
    gathered: list[tuple[NDArray[Any], ...]] = []
    model.eval()
    for batch in loader:
        plan, labels = batch.pop("plan"), batch.pop("labels")
        with torch.no_grad():
            logits = model(**batch).logits
        predictions, scores = task.predict(logits)
        # Processes hold micro-batches of different sizes: rows are padded to the largest, and a padding row, like the
        # stand-in of an empty micro-batch, has index -1.
        index = torch.full((len(labels),), -1) if plan.is_empty else torch.as_tensor(plan.indices)
        index = index.to(labels.device)
        asked = torch.full_like(index, stop_flag is not None and stop_flag.is_raised())
        mine = (index, labels, predictions, scores, task.example_losses(logits, labels), asked)
        padded = tuple(accelerator.pad_across_processes(rows.contiguous(), dim=0, pad_index=-1) for rows in mine)
        rows = tuple(tensor.cpu() for tensor in accelerator.gather_for_metrics(padded))
        if (rows[-1] == 1).any():
            model.train()
            raise StopRequested
        real = rows[0] >= 0
        gathered.append(tuple(tensor[real].numpy() for tensor in rows))
        for metric in metrics:
            metric.add_batch(predictions=gathered[-1][2], references=gathered[-1][1])
    model.train()
    found = [np.concatenate(parts) for parts in zip(*gathered, strict=True)]
    order = np.argsort(found[0])
    _, all_labels, all_predictions, all_scores, losses, _ = (values[order] for values in found)
    assert np.array_equal(found[0][order], np.arange(len(order))), "every example is evaluated exactly once"
    results = {f"{prefix}_loss": _mean_loss(task, losses, all_labels)}
    for metric in metrics if math.isfinite(results[f"{prefix}_loss"]) else ():  # Some raise an error of NaN.
        results.update({f"{prefix}_{name}": value for name, value in metric.compute().items()})
    return Evaluation(results, all_labels, all_predictions, all_scores)


def _mean_loss(task: TextClassification, losses: NDArray[Any], labels: NDArray[Any]) -> float:
    counts = task.example_counts(labels)
    return float(np.sum(losses, dtype=np.float64) / (len(losses) if counts is None else np.sum(counts)))


def save_evaluation(evaluation: Evaluation, task: TextClassification, predictions: Path, report: Path) -> None:
    """Write a line per example, and a report: the metrics, and those of each class."""
    write_atomically(predictions, format_predictions(evaluation, task))
    content = {"metrics": evaluation.metrics, **task.report(evaluation.labels, evaluation.predictions)}
    write_atomically(report, json.dumps(content, indent=2) + "\n")


def format_predictions(evaluation: Evaluation, task: TextClassification) -> str:
    """The text of eval_predictions.jsonl: one line per example with index, label, prediction and score."""
    lines = []
    for index in range(len(evaluation.labels)):
        described = task.describe_prediction(
            evaluation.labels[index], evaluation.predictions[index], evaluation.scores[index]
        )
        lines.append(json.dumps({"index": index, **described}, ensure_ascii=False))
    return "\n".join(lines) + "\n"
