"""`onecurve report`: a page of one run, from its directory alone: curves, evaluations, settings, environment, restarts.

The page is one file without scripts or anything from elsewhere, so it can be mailed and opened years later. What a run
says (names of classes, settings, messages) reaches it escaped, by the template engine.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onecurve.launcher.errors import Unsuitable
from onecurve.launcher.facts.history import (
    History,
    count_device_hours,
    count_seconds,
    estimate_num_steps,
    find_best,
    is_metric,
    list_metrics,
    load_history,
)
from onecurve.launcher.units import GIB, format_count, format_seconds
from onecurve.training.metric_names import pick_main_metrics
from onecurve.training.run_directory import RunDirectory

_TEMPLATE = Path(__file__).with_name("report.html")

# A chart's size and the room around its curves, in the SVG's own units.
_WIDTH, _HEIGHT = 640, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 12, 12, 28
# More points than a chart has columns change nothing that can be seen.
_MAX_POINTS = 600
_MAX_EVALUATIONS = 200
# The strong line is the mean of this share of the steps.
_SMOOTHED_SHARE = 1 / 30

Point = tuple[float, float]


@dataclass(frozen=True)
class Chart:
    """An SVG's parts, in its coordinates; the template draws them.

    Attributes:
        ticks_x, ticks_y: position and label.
        curves: class (of the style) and the points of a polyline.
        dots: x, y and what is told when the pointer rests there.
    """

    title: str
    width: int
    height: int
    left: float
    right: float
    top: float
    bottom: float
    ticks_x: list[tuple[float, str]]
    ticks_y: list[tuple[float, str]]
    curves: list[tuple[str, str]]
    dots: list[tuple[float, float, str]]


def write_report(run: Path) -> Path:
    """Write report.html into the run directory and return its path.

    Raises:
        NotARun: no training has written there.
        Unsuitable: the page can't be written there.
    """
    path = RunDirectory(run).report
    text = render_report(load_history(run))
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise Unsuitable(
            f"{path} can't be written: {error.strerror}; make the run directory writable, or copy it"
        ) from None
    return path


def render_report(history: History) -> str:
    """The page of one run."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        name=history.path.absolute().name,
        path=str(history.path),
        state=history.state,
        message=str(history.status.get("message") or ""),
        tiles=describe_result(history),
        charts=build_charts(history),
        evaluations=_tabulate_evaluations(history),
        classes=_tabulate_classes(history.path),
        test=[(name, _show(value)) for name, value in history.test.items() if name.startswith("test_")],
        settings=[(key, _write(value), history.sources.get(key, "")) for key, value in history.settings.items()],
        environment=list(_flatten(history.environment)),
    )


def describe_result(history: History) -> list[tuple[str, str]]:
    """Name and value of what one looks at first."""
    steps, last = history.steps, history.evaluations[-1] if history.evaluations else {}
    num_steps = estimate_num_steps(history)
    tiles = [("steps", f"{steps[-1]['step'] if steps else 0:,}" + (f" of {num_steps:,}" if num_steps else ""))]
    if steps:
        tiles.append(("last loss", _show(steps[-1].get("loss"))))
    tiles += [(name.replace("_", " "), _show(value)) for name, value in list(last.items()) if is_metric(name, value)][
        :4
    ]
    best = find_best(history, "eval_loss")
    if best is not None and best[0] != last["step"]:
        tiles.append(("best eval loss", f"{_show(best[1])} at {best[0]:,}"))
    seconds = count_seconds(steps)
    if seconds:
        tokens = sum(line.get("tokens", 0) for line in steps)
        tiles += [
            ("training time", format_seconds(seconds)),
            ("device-hours", _show(count_device_hours(history))),
            ("tokens", format_count(tokens)),
            ("tokens a second", f"{tokens / seconds:,.0f}"),
        ]
    if history.peak_memory_bytes is not None:
        tiles.append(("peak memory", f"{history.peak_memory_bytes / GIB:.2f} GiB"))
    if history.num_restarts is not None:
        tiles.append(("restarts", str(history.num_restarts)))
    return tiles


def build_charts(history: History) -> list[Chart]:
    """Loss, learning rate, gradient norm, rate, and the main metrics of the evaluations, all over the same steps."""
    steps = [line["step"] for line in (*history.steps, *history.evaluations)]
    span = (min(steps, default=0), max(steps, default=0))
    charts = []
    for title, key in (
        ("loss", "loss"),
        ("learning rate", "learning_rate"),
        ("gradient norm, before clipping", "grad_norm"),
        ("tokens a second", "tokens_per_second"),
    ):
        points = _pick(history.steps, key)
        dots = _pick(history.evaluations, "eval_loss") if key == "loss" else []
        if points:
            charts.append(draw_chart(title, span, points, dots, smooths=key != "learning_rate"))
    for metric in pick_main_metrics(list_metrics([history]), history.main_metrics):
        dots = _pick(history.evaluations, metric)
        if metric != "eval_loss" and dots:
            charts.append(draw_chart(metric.replace("_", " "), span, [], dots))
    return charts


def draw_chart(
    title: str,
    span: tuple[int, int],
    points: Sequence[Point],
    dots: Sequence[Point],
    smooths: bool = False,
) -> Chart:
    """A chart with a curve through `points` and another through `dots`, whose points can be told apart.

    Args:
        span: first and last step of the axis.
        points, dots: step and value; all finite, and one at least.
        smooths: adds the moving mean of the points as a stronger line.
    """
    first, last = span
    values = [value for _, value in (*points, *dots)]
    ticks = choose_ticks(min(values), max(values))
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

    def place(point: Point) -> Point:
        across = (point[0] - first) / ((last - first) or 1)
        up = (point[1] - ticks[0]) / (ticks[-1] - ticks[0])
        return round(_LEFT + across * (right - _LEFT), 1), round(bottom - up * (bottom - _TOP), 1)

    def join(chosen: Iterable[Point]) -> str:
        return " ".join(f"{x:g},{y:g}" for x, y in map(place, chosen))

    curves = []
    window = max(1, round(len(points) * _SMOOTHED_SHARE))
    if points:
        curves.append(("faint" if smooths and window > 1 else "strong", join(thin_out(points))))
    if smooths and window > 1:
        curves.append(("strong", join(thin_out(smooth(points, window)))))
    if len(dots) > 1:
        curves.append(("evaluation", join(dots)))
    steps = [step for step in choose_ticks(first, last, whole=True) if first <= step <= last]
    return Chart(
        title, _WIDTH, _HEIGHT, _LEFT, right, _TOP, bottom,
        [(place((step, ticks[0]))[0], f"{step:,.0f}") for step in steps],
        [(place((first, tick))[1], _label(tick, ticks[1] - ticks[0])) for tick in ticks],
        curves,
        [(*place(dot), f"step {dot[0]:,.0f}: {_show(dot[1])}") for dot in dots],
    )  # fmt: skip


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


def _pick(lines: Sequence[dict[str, Any]], key: str) -> list[Point]:
    return [
        (line["step"], float(line[key]))
        for line in lines
        if isinstance(line.get(key), (int, float)) and math.isfinite(line[key])
    ]


def _tabulate_evaluations(history: History) -> tuple[list[str], list[list[str]]]:
    names = list_metrics([history])
    lines = history.evaluations[-_MAX_EVALUATIONS:]
    return names, [[f"{line['step']:,}", *(_show(line.get(name)) for name in names)] for line in lines]


def _tabulate_classes(run: Path) -> list[tuple[str, list[str]]]:
    """Precision, recall, F1 and count of each class, from eval_report.json."""
    try:
        found = json.loads(RunDirectory(run).eval_report.read_text(encoding="utf-8"))["per_class"].items()
        return [
            (name, [*(f"{row[key]:.3f}" for key in ("precision", "recall", "f1-score")), f"{row['support']:,.0f}"])
            for name, row in found
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []  # No evaluation yet, or one of numbers, which has no classes.


def _flatten(content: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key} ")
        else:
            yield f"{prefix}{key}".replace("_", " "), _write(value)


def _label(tick: float, size: float) -> str:
    if abs(tick) < size / 1000:
        return "0"
    if abs(tick) >= 1e5:
        return f"{tick:.3g}".replace("e+0", "e").replace("e+", "e")
    if size < 1e-3:
        return f"{tick:.2g}".replace("e-0", "e-")
    return f"{tick:,.{max(0, -math.floor(math.log10(size)))}f}"


def _show(value: object) -> str:
    """A result, rounded."""
    if isinstance(value, float):
        return f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 else f"{value:.4g}"
    return _write(value)


def _write(value: object) -> str:
    """A setting, as it is."""
    if value is None:
        return "-"
    return ", ".join(map(_write, value)) if isinstance(value, list) else str(value)
