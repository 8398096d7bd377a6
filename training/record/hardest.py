"""The examples of an evaluation with the highest loss, as people read them: for eval_report.json and the report page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from onecurve.training.data.columns import Array
from onecurve.training.data.preparation import Split
from onecurve.training.tasks.base import Task

_MOST = 20
_MAX_CHARACTERS = 600


def find_hardest(
    losses: Array, results: Mapping[str, Any], split: Split, task: Task, processor: Any
) -> list[dict[str, Any]]:
    """At most twenty examples, the one with the highest mean loss first: "example", "row" where examples
    are not rows, both from 0, "loss", and the task's own entries.

    Args:
        losses: [examples] summed over each example's targets.
        results: as `Task.compute_metrics` gets them.
    """
    means = losses / split.counts
    hardest = np.argsort(-means, kind="stable")[:_MOST]
    return [
        {
            "example": int(number),
            "loss": float(means[number]),
            **_describe(int(number), results, split, task, processor),
        }
        for number in hardest
    ]


def _describe(number: int, results: Mapping[str, Any], split: Split, task: Task, processor: Any) -> dict[str, Any]:
    shown = task.show_example(split.examples, number, results, processor)
    row = {"row": int(results["row"][number])} if "row" in results else {}
    return {**row, **{name: _shorten(text) for name, text in shown.items()}}


def _shorten(text: str) -> str:
    return text if len(text) <= _MAX_CHARACTERS else f"{text[:_MAX_CHARACTERS]} …"
