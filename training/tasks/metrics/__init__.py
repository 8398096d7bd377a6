"""Metrics as local `evaluate` modules: `evaluate.load` would download a script, which a compute node can't do.

Each is an `evaluate.Metric`, fed by `add_batch` and computed by scikit-learn, SciPy or seqeval.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from onecurve.training.cache import find_cache

if TYPE_CHECKING:
    from evaluate import Metric

__all__ = ["build_accuracy", "build_entity_metric", "build_metrics", "entity_metric_names", "metric_names"]


def build_metrics(problem_type: str, num_labels: int) -> list[Metric]:
    """The metrics of a kind of label. They keep their batches in memory: no cache file, no lock between runs."""
    # Here, because SciPy and scikit-learn take a second to import, and no step needs them before the first evaluation.
    from onecurve.training.tasks.metrics.classification import Accuracy, MatthewsCorrelation, PrecisionRecallF1
    from onecurve.training.tasks.metrics.regression import Correlation, Error

    if problem_type == "regression":
        kinds: list[type[Metric]] = [Error, Correlation]
    elif problem_type == "multi_label_classification":
        kinds = [Accuracy, PrecisionRecallF1]
    else:
        kinds = [Accuracy, PrecisionRecallF1, MatthewsCorrelation]
    config_name = "multilabel" if problem_type == "multi_label_classification" else "default"
    # `evaluate` makes a folder all the same: in our cache, because the hub's may be read-only.
    folder = str(find_cache() / "metrics")
    metrics = [kind(config_name=config_name, keep_in_memory=True, cache_dir=folder) for kind in kinds]
    for metric in metrics:
        metric.num_labels = num_labels
    return metrics


@cache
def metric_names(problem_type: str) -> list[str]:
    """What `build_metrics` will measure, found by measuring two examples."""
    example: Any = {"regression": [0.0, 1.0], "multi_label_classification": [[0, 1], [1, 0]]}.get(problem_type, [0, 1])
    metrics = build_metrics(problem_type, 2)
    return [name for metric in metrics for name in metric.compute(predictions=example, references=example)]


def build_entity_metric() -> Metric:
    """The metric of labels that mark entities."""
    from onecurve.training.tasks.metrics.entities import Entities

    return Entities(keep_in_memory=True, cache_dir=str(find_cache() / "metrics"))


@cache
def entity_metric_names() -> list[str]:
    """What `build_entity_metric` will measure."""
    return list(build_entity_metric().compute(predictions=[["O", "B-X"]], references=[["O", "B-X"]]))


def build_accuracy() -> Metric:
    """Accuracy alone."""
    from onecurve.training.tasks.metrics.classification import Accuracy

    return Accuracy(keep_in_memory=True, cache_dir=str(find_cache() / "metrics"))
