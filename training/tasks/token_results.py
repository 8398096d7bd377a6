"""What an evaluation says of tokens: of results that are sums over each example's targets, "loss", "targets" and "right"."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

# e to the power of more than this is no float.
_MAX_LOSS_OF_PERPLEXITY = 700.0


def measure_tokens(results: Mapping[str, Any], perplexity: str = "perplexity") -> dict[str, float]:
    """Over all targets: e to the power of the mean loss, under this name, and the share of them that is most likely."""
    num_targets = np.sum(results["targets"])
    loss = float(np.sum(results["loss"], dtype=np.float64) / num_targets)
    return {
        perplexity: math.exp(min(loss, _MAX_LOSS_OF_PERPLEXITY)),
        "accuracy": float(np.sum(results["right"]) / num_targets),
    }


def describe_tokens(results: Mapping[str, Any], number: int) -> dict[str, Any]:
    """Of one example the mean loss of its targets, their number, and how many of them are the most likely."""
    targets = int(results["targets"][number])
    return {
        "loss": float(results["loss"][number] / targets),
        "targets": targets,
        "right": int(results["right"][number]),
    }


def describe_right(results: Mapping[str, Any], number: int) -> str:
    """How many targets of one example are the most likely tokens."""
    return f"{int(results['right'][number])} of {int(results['targets'][number])} tokens right"


def describe_counts(kind: str, counts: Mapping[str, int]) -> list[str]:
    """A line for each reason of what is counted by reason: "Left out: 3 (pieces without a target)."."""
    return [f"{kind}: {count:,} ({reason})." for reason, count in counts.items()]
