"""Whether probabilities mean what they say (Guo et al. 2017, "On Calibration of Modern Neural Networks")."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_NUM_BINS = 10


def build_calibration(probabilities: NDArray[Any], is_true: NDArray[Any], of: str) -> dict[str, Any]:
    """Ten bins of equal width that have decisions: how probable these were on average, and which share of them is true.

    Args:
        probabilities: [decisions] what the model gives each.
        is_true: [decisions] whether it is so.
        of: what is decided, for people.

    Returns:
        "of"; "error", the expected calibration error: the mean distance of both, by the decisions of each bin; and "bins",
        each with "low", "high", "count", "probability" and "share".
    """
    numbers = np.minimum((probabilities * _NUM_BINS).astype(int), _NUM_BINS - 1)
    bins, error = [], 0.0
    for number in range(_NUM_BINS):
        here = numbers == number
        if not here.any():
            continue
        probability, share = float(probabilities[here].mean(dtype=np.float64)), float(is_true[here].mean())
        bins.append({
            "low": number / _NUM_BINS, "high": (number + 1) / _NUM_BINS, "count": int(here.sum()),
            "probability": probability, "share": share,
        })  # fmt: skip
        error += abs(probability - share) * float(here.mean())
    return {"of": of, "error": error, "bins": bins}
