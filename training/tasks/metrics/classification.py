"""Accuracy, precision, recall, F1 and Matthews correlation. Formulas: scikit-learn's user guide, section 3.4."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
from sklearn.metrics import (
    accuracy_score,
    classification_report,
    confusion_matrix,
    matthews_corrcoef,
    multilabel_confusion_matrix,
    precision_recall_fscore_support,
)


def _describe(config_name: str, description: str) -> evaluate.MetricInfo:
    kind: Any = datasets.Value("int32")
    if config_name == "multilabel":
        kind = datasets.Sequence(kind)
    return evaluate.MetricInfo(
        description=description,
        citation="",
        inputs_description="predictions and references: class numbers, or a 0/1 list a row (config_name='multilabel')",
        features=datasets.Features({"predictions": kind, "references": kind}),
    )


class Accuracy(evaluate.Metric):
    """Share of examples predicted right; for several labels, of those whose every label is right."""

    def _info(self) -> evaluate.MetricInfo:
        return _describe(self.config_name, "share of examples predicted right")

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"accuracy": float(accuracy_score(references, predictions))}


class PrecisionRecallF1(evaluate.Metric):
    """Precision, recall and F1: macro (mean over classes), micro (over all decisions), weighted (by class size).

    A class that is never predicted has precision 0. Attribute `num_labels` says how many classes there are, so that one
    without an example in this evaluation is counted as well.
    """

    num_labels: int

    def _info(self) -> evaluate.MetricInfo:
        return _describe(self.config_name, "precision, recall and F1; macro, micro and weighted")

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        results = {}
        for average in ("macro", "micro", "weighted"):
            values = precision_recall_fscore_support(
                references, predictions, labels=range(self.num_labels), average=average, zero_division=0
            )
            for name, value in zip(("precision", "recall", "f1"), values[:3], strict=True):
                results[f"{name}_{average}"] = float(value)
        return results


class MatthewsCorrelation(evaluate.Metric):
    """Matthews correlation coefficient, the metric of CoLA: 1 is perfect, 0 is chance."""

    def _info(self) -> evaluate.MetricInfo:
        return _describe(self.config_name, "Matthews correlation coefficient")

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"matthews_correlation": float(matthews_corrcoef(references, predictions))}


def build_report(labels: Any, predictions: Any, names: Sequence[str], is_multi_label: bool) -> dict[str, Any]:
    """Precision, recall and F1 of each class, and the confusion matrix or, for several labels, one for each.

    Args:
        labels, predictions: [examples] class numbers, or [examples, classes] of 0/1.
        names: of the classes.
    """
    classes = range(len(names))
    report = classification_report(
        labels, predictions, labels=classes, target_names=names, output_dict=True, zero_division=0
    )
    if is_multi_label:
        matrices = multilabel_confusion_matrix(labels, predictions)
        matrix: Any = {name: table.tolist() for name, table in zip(names, matrices, strict=True)}
    else:
        matrix = confusion_matrix(labels, predictions, labels=classes).tolist()
    return {"per_class": {name: report[name] for name in names}, "labels": list(names), "confusion_matrix": matrix}
