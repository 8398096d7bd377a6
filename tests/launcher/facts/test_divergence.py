"""How far apart two numbers of a curve are."""

from __future__ import annotations

import math

import pytest

from onecurve.launcher.facts.divergence import measure


@pytest.mark.parametrize(
    ("one", "other", "first", "expected"),
    [
        (1.0, math.nan, 1.0, math.inf),
        (math.nan, 1.0, 1.0, math.inf),
        (math.nan, math.nan, 1.0, 0.0),
        (math.inf, math.inf, math.inf, 0.0),
        (math.inf, 1.0, 1.0, math.inf),
        (2.0, 1.0, math.inf, 0.5),
        (2.0, 1.0, math.nan, 0.5),
        (0.02, 0.01, 2.0, 0.1),
    ],
)
def test_a_number_that_is_not_finite_differs_from_every_other(
    one: float, other: float, first: float, expected: float
) -> None:
    assert measure(one, other, first) == pytest.approx(expected)
