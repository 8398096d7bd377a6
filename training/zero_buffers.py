"""Sizes of DeepSpeed's buffers, from the model's size: the engine sets them, and `onecurve plan` counts them.

DeepSpeed's defaults are made for models of 10B parameters: it allocates 500 million numbers for gradients that wait to be
reduced, and under ZeRO-3 keeps up to a billion gathered weights, however small the model is and a process's share of it.
"""

from __future__ import annotations

LARGEST_BUCKET = 500_000_000
"""Numbers in the buckets of ZeRO-1 and 2, and the most in ZeRO-3's."""

_SMALLEST_BUCKET = 1 << 24
_MOST_LIVE, _FEWEST_LIVE = 1_000_000_000, 100_000_000


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
