"""The charts of a report: of one run, or of several over each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from onecurve.launcher.facts.history import History, list_metrics
from onecurve.launcher.facts.results import StartFact
from onecurve.launcher.units import GIB, format_result
from onecurve.launcher.views.charts import Chart, Series, draw_chart, find_limit
from onecurve.launcher.views.svg import Point
from onecurve.training.metric_names import is_lower_better, pick_main_metrics

Drawn = tuple[str, str, str]
"""Title, latest value, SVG."""

NUM_COLORS = 8
"""Of the palette in report.css; more runs begin it again."""

_LOSS = "loss"
# What is drawn of each step, beside the loss: title, key of metrics.jsonl, factor, and the limit of the axis.
_OF_STEPS = (
    ("learning rate", "learning_rate", 1.0, None),
    ("gradient norm, before clipping", "grad_norm", 1.0, None),
)
_OF_RESOURCES = (
    ("tokens per second", "tokens_per_second", 1.0, None),
    ("peak memory, GiB", "peak_memory_bytes", 1 / GIB, None),
    ("padding, share of all tokens", "padding", 1.0, 1.0),
)


def build_charts(history: History, starts: Sequence[StartFact]) -> tuple[list[Drawn], list[Drawn]]:
    """Charts of what is learned, and of what it takes, over the same steps."""
    span = _find_span([history])
    marks = [(start.step, f"start {start.number}") for start in starts if start.step and start.number > 1]
    learned = [*_draw_loss([history], span, marks), *_draw_metrics([history], span, marks)]
    learned += _draw_steps([history], span, _OF_STEPS, marks)
    return learned, list(_draw_steps([history], span, _OF_RESOURCES, marks))


def build_common_charts(histories: Sequence[History], names: Sequence[str]) -> list[Drawn]:
    """Charts of several runs over each other."""
    span = _find_span(histories)
    return [
        *_draw_loss(histories, span, (), names),
        *_draw_metrics(histories, span, (), names),
        *_draw_steps(histories, span, (*_OF_STEPS, *_OF_RESOURCES), (), names),
    ]


def _find_span(histories: Sequence[History]) -> tuple[int, int]:
    steps = [line["step"] for history in histories for line in (*history.steps, *history.evaluations)]
    return min(steps, default=0), max(steps, default=0)


Marks = Sequence[tuple[int, str]]


def _draw_loss(
    histories: Sequence[History], span: tuple[int, int], marks: Marks, names: Sequence[str] = ()
) -> Iterable[Drawn]:
    series = _collect(histories, names, lambda each: (pick(each.steps, _LOSS), pick(each.evaluations, f"eval_{_LOSS}")))
    yield from _draw(Chart(_LOSS, span, series, smooths=True, marks=marks))


def _draw_metrics(
    histories: Sequence[History], span: tuple[int, int], marks: Marks, names: Sequence[str] = ()
) -> Iterable[Drawn]:
    main = next((history.main_metrics for history in histories if history.main_metrics), [])
    for metric in pick_main_metrics(list_metrics(histories), main):
        if metric == f"eval_{_LOSS}":
            continue
        series = _collect(histories, names, lambda each, metric=metric: ([], pick(each.evaluations, metric)))  # type: ignore[misc]
        limit = find_limit((value for each in series for _, value in each.dots), is_lower_better(metric))
        yield from _draw(Chart(name_metric(metric), span, series, limit=limit, marks=marks))


def _draw_steps(
    histories: Sequence[History],
    span: tuple[int, int],
    kinds: Iterable[tuple[str, str, float, float | None]],
    marks: Marks,
    names: Sequence[str] = (),
) -> Iterable[Drawn]:
    for title, key, factor, limit in kinds:
        series = _collect(
            histories,
            names,
            lambda each, key=key, factor=factor: (pick(each.steps, key, factor), []),  # type: ignore[misc]
        )
        is_smooth = key in ("learning_rate", "peak_memory_bytes")
        yield from _draw(Chart(title, span, series, smooths=not is_smooth, limit=limit, marks=marks))


def _collect(
    histories: Sequence[History], names: Sequence[str], find: Callable[[History], tuple[list[Point], list[Point]]]
) -> list[Series]:
    """The series of each run that has one; of several runs with their names and colors."""
    found = [(number, *find(history)) for number, history in enumerate(histories)]
    return [
        Series(points, dots, names[number], number % NUM_COLORS) if names else Series(points, dots)
        for number, points, dots in found
        if points or dots
    ]


def _draw(chart: Chart) -> Iterable[Drawn]:
    """The chart, unless it would be empty, or a line at zero."""
    if not any(value for each in chart.series for _, value in (*each.points, *each.dots)):
        return
    latest = ""
    if len(chart.series) == 1 and chart.series[0].color is None:
        points = chart.series[0].dots or chart.series[0].points
        latest = format_result(points[-1][1])
        latest = f"validation {latest}" if chart.series[0].points and chart.series[0].dots else latest
    yield chart.title, latest, draw_chart(chart)


def pick(lines: Iterable[Mapping[str, Any]], key: str, factor: float = 1.0) -> list[Point]:
    """Step and value of the lines that have a finite one."""
    return [
        (line["step"], float(line[key]) * factor)
        for line in lines
        if isinstance(line.get(key), (int, float)) and math.isfinite(line[key])
    ]


def name_metric(metric: str) -> str:
    """A metric as people read it: eval_f1_macro is "f1 macro"."""
    return metric.removeprefix("eval_").removeprefix("test_").replace("_", " ")
