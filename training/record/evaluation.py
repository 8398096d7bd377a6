"""Evaluation: each example once on any number of processes, the metrics those of a single process to the last bit."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from onecurve.training.atomic_files import write_atomically
from onecurve.training.data.columns import Array
from onecurve.training.data.layout import Layout
from onecurve.training.data.loading import Loader
from onecurve.training.data.plan import EvaluationPlan, MicroBatch
from onecurve.training.data.preparation import Split
from onecurve.training.models import attention
from onecurve.training.parallel.states import is_sharded, unwrap
from onecurve.training.record.gathering import Part, Round, gather_results
from onecurve.training.record.hardest import find_hardest
from onecurve.training.recovery.stops import StopFlag, StopRequested
from onecurve.training.tasks.base import Forward, Task

# What every evaluation finds of an example, beside the task's own results.
_LOSS = "(loss)"

# A GPU has work queued while results of earlier batches are sent. On a CPU a batch may take seconds, and ranks agree on a
# stop only when they send results.
_ROUNDS_PER_MESSAGE = {"cpu": 1}
_ROUNDS_PER_MESSAGE_ON_A_GPU = 16


@dataclass(frozen=True)
class EvaluationData:
    """A split to evaluate, its micro-batches on all processes, and the prepared loader of this process's, in this layout."""

    split: Split
    plan: EvaluationPlan
    loader: Loader
    layout: Layout


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        metrics: "eval_loss", "eval_accuracy", ... or "test_loss", ...; the loss alone where it is not finite.
        results: what the task found of each example, in the order of the data, by name.
        losses: [examples] summed over each example's targets.
        split: the examples.
    """

    metrics: dict[str, float]
    results: Mapping[str, Any]
    losses: Array
    split: Split


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
    found: list[Part] = []
    rounds: list[Round] = []
    num_rounds = _ROUNDS_PER_MESSAGE.get(accelerator.device.type, _ROUNDS_PER_MESSAGE_ON_A_GPU)
    token_lengths = data.split.examples["input_ids"].lengths if task.ragged_results else None  # type: ignore[union-attr]
    is_asked = False

    def gather() -> None:
        was_asked, parts = gather_results(accelerator, rounds, is_asked, task.ragged_results, token_lengths)
        if was_asked:
            raise StopRequested
        found.extend(parts)
        rounds.clear()

    model.eval()
    try:
        for micro_batches, batch in zip(_deal(data.plan), data.loader, strict=True):
            micro_batch = batch.pop("micro_batch")
            assert np.array_equal(micro_batch.indices, micro_batches[accelerator.process_index].indices)
            with torch.no_grad():
                forward = task.forward(model, batch, wants_results=True)
                if task.generates:
                    forward = replace(
                        forward, results={**forward.results, **_generate(accelerator, model, task, batch)}
                    )
            lengths = None if token_lengths is None else token_lengths[micro_batch.indices]
            rounds.append(Round(micro_batches, _name_results(task, data.layout, lengths, forward)))
            is_asked = is_asked or (stop_flag is not None and stop_flag.is_raised())
            if len(rounds) == num_rounds:
                gather()
        if rounds:
            gather()
    finally:
        model.train()
    results = _put_in_order(found, len(data.split), task.ragged_results, token_lengths)
    losses = results.pop(_LOSS)
    kept = task.unbatched_features & data.split.examples.keys()
    results |= {name: data.split.examples[name][:] for name in kept}
    metrics = {f"{prefix}_loss": float(np.sum(losses, dtype=np.float64) / np.sum(data.split.counts))}
    if math.isfinite(metrics[f"{prefix}_loss"]):  # Some metrics raise an error of NaN.
        metrics |= {f"{prefix}_{name}": value for name, value in task.compute_metrics(results).items()}
    return Evaluation(metrics, results, losses, data.split)


def _generate(
    accelerator: Accelerator, model: torch.nn.Module, task: Task, batch: Mapping[str, torch.Tensor]
) -> Mapping[str, torch.Tensor]:
    inner = unwrap(model)
    with attention.of_transformers(inner):
        return task.generate(inner, batch, is_sharded(accelerator))


def _deal(plan: EvaluationPlan) -> Iterator[tuple[MicroBatch, ...]]:
    """The micro-batches of all processes, [processes] at a time."""
    micro_batches = iter(plan)
    while dealt := tuple(itertools.islice(micro_batches, plan.num_processes)):
        yield dealt


def _name_results(task: Task, layout: Layout, lengths: Array | None, forward: Forward) -> dict[str, torch.Tensor]:
    """All that is sent of a micro-batch: [examples, ...] by name, or [tokens, ...] without padding where it is ragged."""
    assert forward.losses is not None, "evaluation data has targets"
    named = {_LOSS: forward.losses, **forward.results}
    for name in task.ragged_results & named.keys():
        assert lengths is not None, "ragged results need the examples' tokens"
        named[name] = torch.cat(layout.split(named[name], lengths)) if len(lengths) else named[name].flatten(0, 1)
    return named


def _put_in_order(
    found: Sequence[Part], num_examples: int, ragged: frozenset[str], token_lengths: Array | None
) -> dict[str, Any]:
    """Results in the order of the data.

    Args:
        found: indices and results of each micro-batch.
        token_lengths: [examples] tokens of every example; None if no result is ragged.
    """
    order = np.argsort(indices := np.concatenate([part for part, _ in found]))
    assert np.array_equal(indices[order], np.arange(num_examples)), "every example is evaluated exactly once"
    results: dict[str, Any] = {}
    for name in found[0][1]:
        if name in ragged:
            assert token_lengths is not None, "ragged results need the examples' tokens"
            rows = [row for part, values in found
                    for row in np.split(values[name], np.cumsum(token_lengths[part])[:-1])]  # fmt: skip
            results[name] = [rows[number] for number in order]
        else:
            results[name] = np.concatenate([values[name] for _, values in found])[order]
    return results


def save_evaluation(evaluation: Evaluation, task: Task, processor: Any, predictions: Path, report: Path) -> None:
    """Write a line per example, and a report: the metrics, the task's own, and the hardest examples."""
    write_atomically(predictions, format_predictions(evaluation, task))
    content = {"metrics": evaluation.metrics, **task.report(evaluation.results)}
    content["hardest"] = find_hardest(evaluation.losses, evaluation.results, evaluation.split, task, processor)
    write_atomically(report, json.dumps(content, indent=2) + "\n")


def format_predictions(evaluation: Evaluation, task: Task) -> str:
    """The text of eval_predictions.jsonl: a line per example, or per row, with its index."""
    lines = (
        json.dumps({"index": index, **line}, ensure_ascii=False)
        for index, line in enumerate(task.describe_predictions(evaluation.results))
    )
    return "\n".join(lines) + "\n"
