"""Precision, recall and F1 of entities by seqeval, which counts as CoNLL's own script does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
from seqeval.metrics import accuracy_score, classification_report

_AVERAGE = "micro avg"


class Entities(evaluate.Metric):
    """Over all entities: one is right if its kind, its first word and its last one are. Accuracy is of words."""

    def _info(self) -> evaluate.MetricInfo:
        tags = datasets.Sequence(datasets.Value("string"))
        return evaluate.MetricInfo(
            description="precision, recall and F1 of entities, accuracy of words",
            citation="",
            inputs_description="predictions and references: for each row the tags of its words",
            features=datasets.Features({"predictions": tags, "references": tags}),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        total = build_entity_report(predictions, references)[_AVERAGE]
        return {
            "precision": total["precision"],
            "recall": total["recall"],
            "f1": total["f1-score"],
            "accuracy": float(accuracy_score(references, predictions)),
        }


def build_entity_report(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> dict[str, Any]:
    """By kind of entity: precision, recall, F1 and how many there are; and of all together as "micro avg"."""
    rows = [[list(tags) for tags in sequences] for sequences in (references, predictions)]
    if all(tag == "O" for sequences in rows for tags in sequences for tag in tags):
        return {_AVERAGE: {"precision": 0.0, "recall": 0.0, "f1-score": 0.0, "support": 0}}
    report = classification_report(*rows, output_dict=True, zero_division=0)
    return {
        name: {key: int(value) if key == "support" else float(value) for key, value in row.items()}
        for name, row in report.items()
        if name == _AVERAGE or not name.endswith(" avg")
    }
