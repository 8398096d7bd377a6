"""What a run is trained on, for environment.json: where each split comes from, how many examples it has and how long they are."""

from __future__ import annotations

from typing import Any

import numpy as np

from onecurve.training.data.preparation import PreparedData, Split

_NUM_BINS = 24
# Of a larger split every second, third, ... example stands for the others.
_MOST_COUNTED = 1_000_000


def describe_data(data: PreparedData) -> dict[str, Any]:
    """By split its origin, its examples, and the tokens of an example: mean, longest, and a histogram."""
    splits = {"train": data.train, "validation": data.validation, "test": data.test}
    return {name: _describe(split) for name, split in splits.items() if split is not None}


def _describe(split: Split) -> dict[str, Any]:
    lengths = np.asarray(split.lengths[:: 1 + len(split) // _MOST_COUNTED])
    longest = int(lengths.max())
    histogram, _ = np.histogram(lengths, bins=min(_NUM_BINS, max(1, longest)), range=(0, longest))
    return {
        "origin": split.origin,
        "examples": len(split),
        "mean_tokens": round(float(lengths.mean()), 1),
        "longest": longest,
        "histogram": histogram.tolist(),
    }
