"""Mean squared and absolute error, Pearson and Spearman correlation."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import mean_absolute_error, mean_squared_error


def _describe(description: str) -> evaluate.MetricInfo:
    return evaluate.MetricInfo(
        description=description,
        citation="",
        inputs_description="predictions and references: numbers",
        features=datasets.Features({"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}),
    )


class Error(evaluate.Metric):
    """Mean squared error and mean absolute error."""

    def _info(self) -> evaluate.MetricInfo:
        return _describe("mean squared and mean absolute error")

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {
            "mse": float(mean_squared_error(references, predictions)),
            "mae": float(mean_absolute_error(references, predictions)),
        }


class Correlation(evaluate.Metric):
    """Pearson and Spearman correlation; 0 where all predictions or all references are equal (undefined there)."""

    def _info(self) -> evaluate.MetricInfo:
        return _describe("Pearson and Spearman correlation")

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        if len(references) < 2 or np.ptp(predictions) == 0 or np.ptp(references) == 0:
            return {"pearson": 0.0, "spearman": 0.0}
        return {
            "pearson": float(pearsonr(references, predictions)[0]),
            "spearman": float(spearmanr(references, predictions)[0]),
        }
