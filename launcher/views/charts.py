"""One quantity over the steps of a run, as an SVG whose colors come from the page's style."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from onecurve.launcher.units import format_result
from onecurve.launcher.views.svg import Point, Scale, circle, drawing, polyline, text

# A chart's size and the room around its curves, in the SVG's own units.
_WIDTH, _HEIGHT = 640, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 628, 12, 212
# More points than a chart has columns make no visible difference.
_MAX_POINTS = 600
# The strong line is the mean of this share of the steps.
_SMOOTHED_SHARE = 1 / 30


def draw_chart(
    title: str, span: tuple[int, int], points: Sequence[Point], dots: Sequence[Point], smooths: bool = False
) -> str:
    """A chart with a curve through `points` and another through `dots`, which are marked.

    Args:
        span: first and last step of the axis.
        points, dots: step and value; all finite, and one at least.
        smooths: adds the moving mean of the points as a stronger line.
    """
    values = [value for _, value in (*points, *dots)]
    ticks = choose_ticks(min(values), max(values))
    across, up = Scale(*span, _LEFT, _RIGHT), Scale(ticks[0], ticks[-1], _BOTTOM, _TOP)

    def place(chosen: Iterable[Point]) -> list[Point]:
        return [(across.place(step), up.place(value)) for step, value in chosen]

    window = max(1, round(len(points) * _SMOOTHED_SHARE))
    is_smoothed = smooths and window > 1
    parts = [*_draw_grid(ticks, up), *_draw_steps(span, across)]
    if points:
        parts.append(polyline(place(thin_out(points)), class_="faint" if is_smoothed else "strong"))
    if is_smoothed:
        parts.append(polyline(place(thin_out(smooth(points, window))), class_="strong"))
    if len(dots) > 1:
        parts.append(polyline(place(dots), class_="evaluation"))
    parts += [
        circle(x, y, 4, title=f"step {step:,.0f}: {format_result(value)}")
        for (x, y), (step, value) in zip(place(dots), dots, strict=True)
    ]
    return drawing(parts, _WIDTH, _HEIGHT, role="img", aria_label=f"{title} over steps")


def _draw_grid(ticks: Sequence[float], up: Scale) -> Iterable[str]:
    for tick in ticks:
        y = up.place(tick)
        yield polyline([(_LEFT, y), (_RIGHT, y)], class_="grid")
        yield text(_LEFT - 8, y + 4, _label(tick, ticks[1] - ticks[0]), text_anchor="end")


def _draw_steps(span: tuple[int, int], across: Scale) -> Iterable[str]:
    for step in choose_ticks(*span, whole=True):
        if span[0] <= step <= span[1]:
            x = across.place(step)
            yield text(x, _BOTTOM + 20, f"{step:,.0f}", text_anchor="end" if x > _RIGHT - 20 else "middle")


def choose_ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Four to eight round numbers around a range: steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        high = low + (abs(low) or 1.0) * 0.1
    exponent = math.floor(math.log10((high - low) / 4))
    size = next(factor * 10.0**exponent for factor in (1, 2, 5, 10) if (high - low) / (factor * 10.0**exponent) <= 6)
    if whole:
        size = max(1.0, size)
    start = math.floor(low / size + 1e-9)
    stop = math.ceil(high / size - 1e-9)
    return [number * size for number in range(start, max(stop, start + 1) + 1)]


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


def _label(tick: float, size: float) -> str:
    if abs(tick) < size / 1000:
        return "0"
    if abs(tick) >= 1e5:
        return f"{tick:.3g}".replace("e+0", "e").replace("e+", "e")
    if size < 1e-3:
        return f"{tick:.2g}".replace("e-0", "e-")
    return f"{tick:,.{max(0, -math.floor(math.log10(size)))}f}"
