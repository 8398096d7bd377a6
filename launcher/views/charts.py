"""One quantity over the steps of one run or of several, as an SVG whose colors come from the page's style."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from onecurve.launcher.units import format_result
from onecurve.launcher.views.svg import Point, Scale, circle, drawing, polyline, text

# A chart's size and the room around its curves, in the SVG's own units.
_WIDTH, _HEIGHT = 520, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 508, 18, 190
# More points than a chart has columns make no visible difference.
_MAX_POINTS = 600
# The strong line is the mean of this share of the steps.
_SMOOTHED_SHARE = 1 / 30
# An axis of a score spans at least this share of what the score can be: a change in the third digit is no cliff.
_LEAST_SPAN = 0.05
_MAX_DOTS = 60


@dataclass(frozen=True)
class Series:
    """Curves of one run.

    Attributes:
        points: step and value of each step; all finite.
        dots: step and value of each evaluation, which is marked.
        name: of the run, for the titles of its dots; empty where there is one run.
        color: a number of the page's palette; None has the colors of training and evaluation.
    """

    points: Sequence[Point] = ()
    dots: Sequence[Point] = ()
    name: str = ""
    color: int | None = None


@dataclass(frozen=True)
class Chart:
    """What is drawn of one quantity.

    Attributes:
        title: what it is.
        span: first and last step of the axis.
        smooths: adds the moving mean of the points as a stronger line; of several runs only that is drawn.
        limit: a value that the quantity never exceeds, such as 1 of an accuracy.
        marks: steps after which the training was started again, by what to call them.
    """

    title: str
    span: tuple[int, int]
    series: Sequence[Series]
    smooths: bool = False
    limit: float | None = None
    marks: Sequence[tuple[int, str]] = field(default=())


def draw_chart(chart: Chart) -> str:
    """The chart; its series have one point or dot at least."""
    values = [value for each in chart.series for _, value in (*each.points, *each.dots)]
    ticks = choose_ticks(min(values), max(values), limit=chart.limit)
    across, up = Scale(*chart.span, _LEFT, _RIGHT), Scale(ticks[0], ticks[-1], _BOTTOM, _TOP)
    parts = [*_draw_grid(ticks, up), *_draw_steps(chart.span, across), *_draw_marks(chart.marks, across)]
    for each in chart.series:
        parts += _draw_series(each, chart, across, up)
    return drawing(parts, _WIDTH, _HEIGHT, role="img", aria_label=f"{chart.title} over steps")


def _draw_series(series: Series, chart: Chart, across: Scale, up: Scale) -> Iterable[str]:
    def place(chosen: Iterable[Point]) -> list[Point]:
        return [(across.place(step), up.place(value)) for step, value in chosen]

    of_run = "" if series.color is None else f" run{series.color}"
    window = max(1, round(len(series.points) * _SMOOTHED_SHARE))
    is_smoothed = chart.smooths and window > 1
    if series.points and not (is_smoothed and of_run):
        yield polyline(place(thin_out(series.points)), class_=("faint" if is_smoothed else "strong") + of_run)
    if is_smoothed:
        yield polyline(place(thin_out(smooth(series.points, window))), class_=f"strong{of_run}")
    if len(series.dots) > 1:
        yield polyline(place(series.dots), class_=f"evaluation{of_run}")
    if len(series.dots) <= _MAX_DOTS:
        for (x, y), (step, value) in zip(place(series.dots), series.dots, strict=True):
            title = f"{series.name} step {step:,.0f}: {format_result(value)}".strip()
            yield circle(x, y, 3.5, title=title, class_=f"dot{of_run}")
    if len(series.dots) == 1 and not of_run:  # Alone it says nothing without its value.
        [(x, y)] = place(series.dots)
        is_left = x > (_LEFT + _RIGHT) / 2
        yield text(
            x + (-10 if is_left else 10), y + (16 if y < _TOP + 20 else -8), format_result(series.dots[0][1]),
            text_anchor="end" if is_left else "start", class_="value",
        )  # fmt: skip


def _draw_grid(ticks: Sequence[float], up: Scale) -> Iterable[str]:
    for tick in ticks:
        y = up.place(tick)
        yield polyline([(_LEFT, y), (_RIGHT, y)], class_="grid")
        yield text(_LEFT - 8, y + 4, label_tick(tick, ticks[1] - ticks[0]), text_anchor="end")


def _draw_steps(span: tuple[int, int], across: Scale) -> Iterable[str]:
    for step in choose_ticks(*span, whole=True):
        if span[0] <= step <= span[1]:
            x = across.place(step)
            yield text(x, _BOTTOM + 20, f"{step:,.0f}", text_anchor="end" if x > _RIGHT - 16 else "middle")


def _draw_marks(marks: Sequence[tuple[int, str]], across: Scale) -> Iterable[str]:
    for step, name in marks:
        x = across.place(step)
        yield polyline([(x, _TOP), (x, _BOTTOM)], class_="mark")
        is_left = x > _RIGHT - 70
        yield text(x + (-5 if is_left else 5), _TOP - 4, name, text_anchor="end" if is_left else "start")


def find_limit(values: Iterable[float], is_lower_better: bool) -> float | None:
    """What a score of these values never exceeds: 1, or 100 where it is in percent; None for what has no such limit."""
    highest = max(values, default=math.inf)
    if is_lower_better or highest > 100:
        return None
    return 1.0 if highest <= 1 else 100.0


def choose_ticks(low: float, high: float, whole: bool = False, limit: float | None = None) -> list[float]:
    """Four to eight round numbers around a range: steps of 1, 2 or 5 times a power of ten.

    Args:
        whole: only whole numbers.
        limit: no value lies above it, and so no tick, because it is a multiple of every step. The range is no narrower than a
            twentieth of it, and of a single value it is all of it. Nor is it below 0 where no value is.
    """
    if not high > low:
        low, high = min(0.0, low), max(limit or 0.0, high)
        high = high if high > low else low + 1.0
    elif limit is not None and high - low < _LEAST_SPAN * limit:
        middle, is_positive = (low + high) / 2, low >= 0
        high = min(limit, middle + _LEAST_SPAN * limit / 2)
        low = min(low, high - _LEAST_SPAN * limit)
        if is_positive and low < 0:
            low, high = 0.0, _LEAST_SPAN * limit
    exponent = math.floor(math.log10((high - low) / 4))
    size = next(factor * 10.0**exponent for factor in (1, 2, 5, 10) if (high - low) / (factor * 10.0**exponent) <= 6)
    if whole:
        size = max(1.0, size)
    start = math.floor(low / size + 1e-9)
    stop = max(math.ceil(high / size - 1e-9), start + 1)
    return [number * size for number in range(start, stop + 1)]


def thin_out(points: Sequence[Point]) -> list[Point]:
    """At most _MAX_POINTS points: from each stretch its lowest and its highest, so that no spike is lost."""
    if len(points) <= _MAX_POINTS:
        return list(points)
    size = math.ceil(len(points) / (_MAX_POINTS // 2))
    chosen: list[Point] = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        extremes = {min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])}
        chosen += sorted(extremes)
    return chosen


def smooth(points: Sequence[Point], window: int) -> list[Point]:
    """The mean of each point and up to `window` on either side of it."""
    sums = [0.0]
    for _, value in points:
        sums.append(sums[-1] + value)
    smoothed = []
    for number, (step, _) in enumerate(points):
        start, stop = max(0, number - window), min(len(points), number + window + 1)
        smoothed.append((step, (sums[stop] - sums[start]) / (stop - start)))
    return smoothed


def label_tick(tick: float, size: float) -> str:
    """A round number with the digits that tell it from its neighbors, which are `size` away."""
    if abs(tick) < size / 1000:
        return "0"
    if abs(tick) >= 1e5:
        return f"{tick:.3g}".replace("e+0", "e").replace("e+", "e")
    if size < 1e-3:
        return f"{tick:.2g}".replace("e-0", "e-")
    return f"{tick:,.{max(0, -math.floor(math.log10(size) + 1e-9))}f}"
