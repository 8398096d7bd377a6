"""Accuracy, precision, recall, F1 and Matthews correlation. Formulas: scikit-learn's user guide, section 3.4."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
from sklearn.metrics import accuracy_score, matthews_corrcoef, precision_recall_fscore_support


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
