"""What can be said of a metric from its name alone; training and launcher share it."""

from __future__ import annotations

from collections.abc import Sequence

_LOWER_IS_BETTER = ("loss", "perplexity", "mse", "mae", "rmse", "error_rate")


def is_lower_better(name: str) -> bool:
    """Whether a metric improves by falling, such as eval_loss."""
    return name.endswith(_LOWER_IS_BETTER)


def pick_main_metrics(names: Sequence[str], main: Sequence[str]) -> list[str]:
    """The metrics that people look at first.

    Args:
        names: with their prefix, such as eval_accuracy.
        main: those that the task calls its main ones, without prefix; environment.json of a run has them.

    Returns:
        Those of `names` that are among `main`, or the first three where none is.
    """
    return [name for name in names if name.partition("_")[2] in main] or list(names[:3])
