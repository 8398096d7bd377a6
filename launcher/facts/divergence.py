"""Where the curves of two runs part, and what the curves themselves say about the reason."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from onecurve.launcher.errors import UsageError
from onecurve.launcher.facts.history import History

Line = Mapping[str, Any]

Sign = Literal["examples", "forward", "rate", "later", "evaluation", "length"]
"""What the curves show, in the order in which a step does it: other examples were seen; the first loss differs on the same
examples; the learning rate differs; all of this is the same and the curves part later; only evaluations differ; one run ends
before the other."""

# Rounding changes a gradient norm more than a loss (docs/INVARIANCE.md: 1e-4 beside 1e-5).
_GRAD_NORM_FACTOR = 10

# Where a number is far smaller than it was at first, its rounding errors are still those of the numbers it comes from: it is
# measured by this part of the first one.
_SMALLEST_SCALE = 0.05

# More than the rounding of one float32 forward. A schedule is computed on the host, the same to the last bits.
_FORWARD_ROUNDING = 2e-6
_RATE_ROUNDING = 1e-9


@dataclass(frozen=True)
class Parting:
    """The first number that differs.

    Attributes:
        step: of its line in metrics.jsonl, from 1.
        quantity: its name there; "steps" where one run ends before the other.
        values: of both runs.
        deviation: relative difference.
        allowed: the largest that is none.
    """

    step: int
    quantity: str
    values: tuple[Any, Any]
    deviation: float
    allowed: float = 0.0

    @property
    def differs(self) -> bool:
        """Whether the numbers are further apart than they may be."""
        return self.deviation > self.allowed


@dataclass(frozen=True)
class Divergence:
    """What two curves have in common and where they part.

    Attributes:
        parting: None where the curves agree.
        num_steps: steps that both runs have.
        num_evaluations: evaluations that both have.
        largest: by quantity the largest relative difference of all.
        num_with_digests: steps of which both runs recorded the examples.
        first_other_examples: the first step whose examples differ, as far as is recorded.
        signs: what the curves show about the reason.
        other_metrics: metrics that differ although their evaluation's loss agrees, as (step, name, values).
    """

    parting: Parting | None
    num_steps: int
    num_evaluations: int
    largest: Mapping[str, float]
    num_with_digests: int
    first_other_examples: int | None
    signs: Sequence[Sign]
    other_metrics: Sequence[tuple[int, str, tuple[float, float]]]


def find_divergence(one: History, other: History, tolerance: float) -> Divergence:
    """Compare the losses, gradient norms and learning rates of all steps, the losses of evaluations, and the lengths.

    Args:
        tolerance: largest relative difference of a loss; of a gradient norm ten times as much.

    Raises:
        UsageError: the runs have no step in common.
    """
    pairs = _pair(one.steps, other.steps)
    if not pairs:
        raise UsageError(
            f"{str(one.path)!r} and {str(other.path)!r} have no step in common: "
            + ", ".join(f"{history.path} has {_describe_steps(history)}" for history in (one, other))
        )
    evaluations = _pair(one.evaluations, other.evaluations)
    tests = [(one.test, other.test)] if one.test and other.test else []
    measured = [
        replace(each, allowed=tolerance * (_GRAD_NORM_FACTOR if each.quantity == "grad_norm" else 1))
        for each in (*_measure_steps(pairs), *_measure_losses(evaluations, "eval"), *_measure_losses(tests, "test"))
    ]
    parted = [each for each in measured if each.differs]
    # An evaluation follows its step, and the test data follow the last.
    parted.sort(key=lambda each: (each.step, each.quantity.startswith(("eval_", "test_"))))
    parting = parted[0] if parted else _find_early_end(one, other)
    digests = [pair for pair in pairs if all("examples_digest" in line for line in pair)]
    first_other = next((first["step"] for first, second in pairs if _saw_others(first, second)), None)
    largest: dict[str, float] = {}
    for each in measured:
        largest[each.quantity] = max(each.deviation, largest.get(each.quantity, 0.0))
    return Divergence(
        parting,
        len(pairs),
        len(evaluations),
        largest,
        len(digests),
        first_other,
        () if parting is None else tuple(_find_signs(parting, pairs, measured, first_other)),
        tuple(_find_other_metrics(evaluations, {each.step for each in parted})),
    )


def measure(one: float, other: float, first: float) -> float:
    """The relative difference of two numbers of a curve.

    Gradient norms in fp16 may be infinite or no number: 0 where both runs have the same, infinite where they have not.

    Args:
        first: the curve's first number; it gives the scale of small ones, unless it is not finite itself.
    """
    if one == other or (math.isnan(one) and math.isnan(other)):
        return 0.0
    if not (math.isfinite(one) and math.isfinite(other)):
        return math.inf
    return abs(one - other) / max(abs(one), abs(other), _SMALLEST_SCALE * abs(first) if math.isfinite(first) else 0.0)


def _pair(one: Sequence[Line], other: Sequence[Line]) -> list[tuple[Line, Line]]:
    others = {line["step"]: line for line in other}
    return [(line, others[line["step"]]) for line in one if line["step"] in others]


def _measure_steps(pairs: Sequence[tuple[Line, Line]]) -> Iterator[Parting]:
    for quantity in ("loss", "grad_norm", "learning_rate"):
        first = pairs[0][0].get(quantity, 0.0)
        scale = 0.0 if quantity == "learning_rate" else first
        for one, other in pairs:
            if quantity in one and quantity in other:
                values = (one[quantity], other[quantity])
                yield Parting(one["step"], quantity, values, measure(*values, scale))


def _measure_losses(pairs: Sequence[tuple[Line, Line]], event: str) -> Iterator[Parting]:
    name = f"{event}_loss"
    for one, other in pairs:
        if name in one and name in other:
            yield Parting(
                one["step"], name, (one[name], other[name]), measure(one[name], other[name], pairs[0][0][name])
            )


def _find_early_end(one: History, other: History) -> Parting | None:
    lasts = (one.steps[-1]["step"], other.steps[-1]["step"])
    return (
        None if lasts[0] == lasts[1] else Parting(min(lasts) + 1, "steps", lasts, abs(lasts[0] - lasts[1]) / max(lasts))
    )


def _saw_others(one: Line, other: Line) -> bool:
    """Whether two lines of a step tell of other examples. Lines of earlier versions have no digest, but know how many."""
    names = ("examples_digest", "examples", "tokens")
    return any(name in one and name in other and one[name] != other[name] for name in names)


def _find_signs(
    parting: Parting, pairs: Sequence[tuple[Line, Line]], measured: Sequence[Parting], first_other: int | None
) -> Iterator[Sign]:
    if parting.quantity == "steps":
        yield "length"
        return
    if parting.quantity.startswith(("eval_", "test_")):
        yield "evaluation"
        return
    deviations = {(each.quantity, each.step): each.deviation for each in measured}
    first_step = pairs[0][0]["step"]
    sees_others = first_other is not None and first_other <= parting.step
    if sees_others:
        yield "examples"
    is_first_same = first_other != first_step
    if is_first_same and deviations.get(("loss", first_step), 0.0) > _FORWARD_ROUNDING:
        yield "forward"
    has_other_rate = any(
        deviation > _RATE_ROUNDING
        for (quantity, step), deviation in deviations.items()
        if quantity == "learning_rate" and step <= parting.step
    )
    if has_other_rate:
        yield "rate"
    if not sees_others and not has_other_rate and deviations.get(("loss", first_step), 0.0) <= _FORWARD_ROUNDING:
        yield "later"


def _find_other_metrics(
    pairs: Sequence[tuple[Line, Line]], parted: set[int]
) -> Iterator[tuple[int, str, tuple[float, float]]]:
    for one, other in pairs:
        for name, value in one.items():
            if name.startswith("eval_") and one["step"] not in parted and isinstance(value, (int, float)):
                theirs = other.get(name)
                if (
                    isinstance(theirs, (int, float))
                    and measure(value, theirs, 0.0) > _GRAD_NORM_FACTOR * _FORWARD_ROUNDING
                ):
                    yield one["step"], name, (value, theirs)


def _describe_steps(history: History) -> str:
    if not history.steps:
        return "none yet"
    return f"steps {history.steps[0]['step']} to {history.steps[-1]['step']}"
