"""Sizes of DeepSpeed's buffers, from the model's size: the engine sets them, and `onecurve plan` counts them.

DeepSpeed's defaults are made for models of 10B parameters: it allocates 500 million numbers for gradients that wait to be
reduced, and under ZeRO-3 keeps up to a billion gathered weights, however small the model is and a process's share of it.
"""

from __future__ import annotations

LARGEST_BUCKET = 500_000_000
"""Numbers in the buckets of ZeRO-1 and 2, and the most in ZeRO-3's."""

SUB_GROUP = 1 << 25
"""Numbers of a process's share that ZeRO-3 updates at a time: it copies their gradients behind each other before.

DeepSpeed's default is a billion, which is the whole share of most models.
"""

_SMALLEST_BUCKET = 1 << 24
_MOST_LIVE, _FEWEST_LIVE = 1_000_000_000, 1 << 25
_MOST_AHEAD, _FEWEST_AHEAD = 50_000_000, 1 << 22


def count_bucket(stage: int, num_parameters: int) -> int:
    """Numbers in all buckets for gradients that wait to be reduced.

    Under ZeRO-3, whose processes have no room for a whole model, a sixteenth of it, or what small models send in one message.
    """
    if stage < 3:
        return LARGEST_BUCKET
    return min(LARGEST_BUCKET, max(_SMALLEST_BUCKET, num_parameters // 16))


def count_live_parameters(num_parameters: int) -> int:
    """Gathered weights that ZeRO-3 may keep for their next use, besides those of the layer that computes."""
    return min(_MOST_LIVE, max(_FEWEST_LIVE, num_parameters // 8))


def count_prefetched_parameters(num_parameters: int) -> int:
    """Weights that ZeRO-3 gathers ahead of their use in one message, which lies beside them until it is cut up."""
    return min(_MOST_AHEAD, max(_FEWEST_AHEAD, num_parameters // 32))
