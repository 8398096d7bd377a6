"""`onecurve report`: a page of one run, read from its run directory: curves, evaluations, settings, environment, restarts.

The page is one file without scripts or links to other files, so it can be mailed and opened years later. All text of a
run (names of classes, settings, messages) is escaped, by the template engine or by views/svg.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
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
from onecurve.launcher.units import format_count, format_gib, format_result, format_seconds, format_setting
from onecurve.launcher.views.charts import draw_chart
from onecurve.launcher.views.svg import Point
from onecurve.training.atomic_files import write_atomically
from onecurve.training.metric_names import pick_main_metrics
from onecurve.training.run_directory import RunDirectory

_TEMPLATE = Path(__file__).with_name("report.html")

_MAX_EVALUATIONS = 200
_MAX_SAMPLE_CHARACTERS = 2_000


def write_report(run: Path) -> Path:
    """Write report.html into the run directory and return its path.

    Raises:
        NotARun: no training has written there.
        Unsuitable: the page can't be written there.
    """
    path = RunDirectory(run).report
    text = render_report(load_history(run))
    try:
        write_atomically(path, text)
    except OSError as error:
        raise Unsuitable(
            f"{path} can't be written: {error.strerror}; make the run directory writable, or copy it to a place that is"
        ) from None
    return path


def render_report(history: History) -> str:
    """The page of one run."""
    import jinja2
    import markupsafe

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
        charts=[(title, markupsafe.Markup(chart)) for title, chart in build_charts(history)],
        evaluations=_tabulate_evaluations(history),
        classes=_tabulate_classes(history.path),
        samples=_tabulate_samples(history.path),
        test=[(name, format_result(value)) for name, value in history.test.items() if name.startswith("test_")],
        settings=[
            (key, format_setting(value), history.sources.get(key, "")) for key, value in history.settings.items()
        ],
        environment=list(_flatten(history.environment)),
    )


def describe_result(history: History) -> list[tuple[str, str]]:
    """Name and value of the main results."""
    steps, last = history.steps, history.evaluations[-1] if history.evaluations else {}
    num_steps = estimate_num_steps(history)
    tiles = [("steps", f"{steps[-1]['step'] if steps else 0:,}" + (f" of {num_steps:,}" if num_steps else ""))]
    if steps:
        tiles.append(("last loss", format_result(steps[-1].get("loss"))))
    tiles += [
        (name.replace("_", " "), format_result(value)) for name, value in list(last.items()) if is_metric(name, value)
    ][:4]
    best = find_best(history, "eval_loss")
    if best is not None and best[0] != last["step"]:
        tiles.append(("best eval loss", f"{format_result(best[1])} at {best[0]:,}"))
    seconds = count_seconds(steps)
    if seconds:
        tokens = sum(line.get("tokens", 0) for line in steps)
        tiles += [
            ("training time", format_seconds(seconds)),
            ("device-hours", format_result(count_device_hours(history))),
            ("tokens", format_count(tokens)),
            ("tokens per second", f"{tokens / seconds:,.0f}"),
        ]
    if history.peak_memory_bytes is not None:
        tiles.append(("peak memory", f"{format_gib(history.peak_memory_bytes)} GiB"))
    if history.num_restarts is not None:
        tiles.append(("restarts", str(history.num_restarts)))
    return tiles


def build_charts(history: History) -> list[tuple[str, str]]:
    """Title and SVG of loss, learning rate, gradient norm, rate, and the main metrics of the evaluations, over the same steps."""
    steps = [line["step"] for line in (*history.steps, *history.evaluations)]
    span = (min(steps, default=0), max(steps, default=0))
    charts = []
    for title, key in (
        ("loss", "loss"),
        ("learning rate", "learning_rate"),
        ("gradient norm, before clipping", "grad_norm"),
        ("tokens per second", "tokens_per_second"),
    ):
        points = _pick(history.steps, key)
        dots = _pick(history.evaluations, "eval_loss") if key == "loss" else []
        if points:
            charts.append((title, draw_chart(title, span, points, dots, smooths=key != "learning_rate")))
    for metric in pick_main_metrics(list_metrics([history]), history.main_metrics):
        dots = _pick(history.evaluations, metric)
        if metric != "eval_loss" and dots:
            title = metric.replace("_", " ")
            charts.append((title, draw_chart(title, span, [], dots)))
    return charts


def _pick(lines: Sequence[dict[str, Any]], key: str) -> list[Point]:
    return [
        (line["step"], float(line[key]))
        for line in lines
        if isinstance(line.get(key), (int, float)) and math.isfinite(line[key])
    ]


def _tabulate_evaluations(history: History) -> tuple[list[str], list[list[str]]]:
    names = list_metrics([history])
    lines = history.evaluations[-_MAX_EVALUATIONS:]
    return names, [[f"{line['step']:,}", *(format_result(line.get(name)) for name in names)] for line in lines]


def _tabulate_classes(run: Path) -> list[tuple[str, list[str]]]:
    """Precision, recall, F1 and count of each class, from eval_report.json."""
    try:
        found = json.loads(RunDirectory(run).eval_report.read_text(encoding="utf-8"))["per_class"].items()
        return [
            (name, [*(f"{row[key]:.3f}" for key in ("precision", "recall", "f1-score")), f"{row['support']:,.0f}"])
            for name, row in found
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []  # No evaluation yet, or a task without classes.


def _tabulate_samples(run: Path) -> tuple[int, list[list[str]]]:
    """The last step of samples.jsonl, and its generations: row, prompt, what was written, what the data has there."""
    try:
        lines = [json.loads(line) for line in RunDirectory(run).samples.read_text(encoding="utf-8").splitlines()]
        last = max((int(line["step"]) for line in lines), default=0)
        names = ("row", "prompt", "generated", "reference")
        return last, [
            [str(line[name])[:_MAX_SAMPLE_CHARACTERS] for name in names] for line in lines if line["step"] == last
        ]
    except (OSError, ValueError, KeyError, TypeError):
        return 0, []  # The task makes none, or another one's have other columns.


def _flatten(content: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key} ")
        else:
            yield f"{prefix}{key}".replace("_", " "), format_setting(value)
