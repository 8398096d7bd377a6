"""The settings of each trial of a grid, of a random search, or of a list: known before anything starts."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping

from onecurve.launcher.sweeps.sweep_file import Range, Sweep


def list_settings(sweep: Sweep) -> list[dict[str, str]]:
    """The settings of all trials, in their order; for tpe, whose trials are chosen one by one, there are none."""
    if sweep.strategy == "tpe":
        return []
    if sweep.strategy == "runs":
        return [dict(run) for run in sweep.runs]
    if sweep.strategy == "random":
        return [draw_settings(sweep, number) for number in range(sweep.num_trials)]
    lists = [values for values in sweep.parameters.values() if isinstance(values, tuple)]
    return [dict(zip(sweep.parameters, values, strict=True)) for values in itertools.product(*lists)]


def draw_settings(sweep: Sweep, number: int) -> dict[str, str]:
    """The settings of one trial of a random search: a function of the seed, the trial's number and the key alone.

    So a sweep with more trials begins with the same ones, and a key more changes no other key's values.
    """
    return {
        key: _draw(values, random.Random(f"{sweep.seed}:{number}:{key}").random())
        for key, values in sweep.parameters.items()
    }


def list_probes(sweep: Sweep) -> list[dict[str, str]]:
    """Settings in which each value of a list and each bound of a range stands once: what can be checked before tpe."""
    ends = {
        key: [_format(values, values.low), _format(values, values.high)] if isinstance(values, Range) else list(values)
        for key, values in sweep.parameters.items()
    }
    first = {key: values[0] for key, values in ends.items()}
    others = [{**first, key: value} for key, values in ends.items() for value in values[1:]]
    return [first, *others]


def _draw(values: tuple[str, ...] | Range, fraction: float) -> str:
    """The value at a fraction, from 0 to below 1, of all values."""
    if not isinstance(values, Range):
        return values[int(fraction * len(values))]
    # Each whole number stands for an interval of length 1 around it.
    margin = 0.5 if values.is_whole else 0.0
    low, high = values.low - margin, values.high + margin
    if values.log:
        number = math.exp(math.log(low) + fraction * (math.log(high) - math.log(low)))
    else:
        number = low + fraction * (high - low)
    if values.is_whole:
        number = min(max(round(number), values.low), values.high)
    return format_drawn(values, number)


def format_drawn(span: Range, number: float) -> str:
    """A number that was drawn from a range as the text of a flag: with four digits, which nothing finer can tell apart."""
    if span.is_whole:
        return _format(span, number)
    return _format(span, min(max(float(f"{number:.4g}"), span.low), span.high))


def _format(span: Range, number: float) -> str:
    return str(int(number)) if span.is_whole else repr(float(number))


def describe_settings(settings: Mapping[str, str]) -> str:
    """The settings of a trial on one line."""
    return ", ".join(f"{key} {value}" for key, value in settings.items())
