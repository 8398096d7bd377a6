"""`onecurve report`: a page of one run, or of several side by side, read from their run directories.

The page is one file without scripts or links to other files, so it can be mailed and opened years later. All text of a
run (names of classes, settings, messages) is escaped, by the template engine or by views/svg.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from onecurve.launcher.errors import Unsuitable, UsageError
from onecurve.launcher.facts.history import History, load_history
from onecurve.launcher.facts.results import Results, list_confusions, load_results, load_starts
from onecurve.launcher.units import format_result, format_setting
from onecurve.launcher.views.compare import build_comparison
from onecurve.launcher.views.figures import (
    MOST_CLASSES,
    MOST_IN_HALF,
    draw_calibration,
    draw_confusion,
    draw_lengths,
    draw_share,
)
from onecurve.launcher.views.report_charts import NUM_COLORS, build_charts, build_common_charts
from onecurve.launcher.views.report_facts import (
    describe_data,
    describe_facts,
    describe_figures,
    describe_lede,
    flatten,
    split_settings,
    tabulate_comparison,
    tabulate_evaluations,
    tabulate_starts,
)
from onecurve.training.atomic_files import write_atomically
from onecurve.training.run_directory import RunDirectory

GENERATOR = "onecurve report"

# Of several runs, in the folder where the command runs.
_COMMON_NAME = "report.html"

_MOST_CONFUSIONS = 6


def write_report(runs: Sequence[Path], output: Path | None = None) -> Path:
    """Write a page of one run or of several, and return its path.

    Args:
        output: by default report.html in the run directory of a single run, and of several in the present folder.

    Raises:
        NotARun: one of them is no run directory.
        UsageError: the page would replace a file that is none.
        Unsuitable: the page can't be written there.
    """
    path = output or (RunDirectory(runs[0]).report if len(runs) == 1 else Path(_COMMON_NAME))
    histories = [load_history(run) for run in runs]
    text = render_report(histories[0]) if len(histories) == 1 else render_runs(histories)
    try:
        if path.is_file() and GENERATOR.encode() not in path.read_bytes()[:2_000]:
            raise UsageError(f"{path} exists and is no page of `onecurve report`; give another file with --output")
        write_atomically(path, text)
    except OSError as error:
        raise Unsuitable(
            f"{path} can't be written: {error.strerror}; make its folder writable, or give another file with --output"
        ) from None
    return path


def render_report(history: History) -> str:
    """The page of one run."""
    results, starts = load_results(history.path), load_starts(history)
    charts, resources = build_charts(history, starts)
    evaluations, more_metrics = tabulate_evaluations(history)
    settings, defaults = split_settings(history)
    name = history.path.absolute().name
    return _render(
        "report.html",
        title=f"{name}: {history.state}",
        name=name,
        state=history.state,
        message=str(history.status.get("message") or ""),
        lede=describe_lede(history),
        figures=describe_figures(history),
        facts=describe_facts(history),
        charts=_mark_safe(charts),
        resources=_mark_safe(resources),
        evaluations=evaluations,
        more_metrics=more_metrics,
        test=[
            (key.removeprefix("test_").replace("_", " "), format_result(value))
            for key, value in history.test.items()
            if key.startswith("test_")
        ],
        starts=tabulate_starts(starts),
        settings=settings,
        defaults=defaults,
        environment=[(key, value) for key, value in flatten(history.environment) if not key.startswith("data ")],
        **_show_results(results),
        **_show_lengths(history),
    )


def render_runs(histories: Sequence[History]) -> str:
    """The page of several runs: curves over each other, and what differs in a table."""
    comparison = build_comparison(histories)
    names = comparison["runs"]
    return _render(
        "report_runs.html",
        title=f"{len(names)} runs",
        runs=[
            (name, history.state, number % NUM_COLORS)
            for number, (name, history) in enumerate(zip(names, histories, strict=True))
        ],
        charts=_mark_safe(build_common_charts(histories, names)),
        groups=tabulate_comparison(comparison),
    )


def _show_results(results: Results) -> dict[str, Any]:
    confusion, calibration = results.confusion, results.calibration
    drawn = confusion if confusion is not None and len(confusion.labels) <= MOST_CLASSES else None
    classes = sorted(results.classes, key=lambda each: (each.f1, each.name))
    return {
        "confusion": drawn and _safe(draw_confusion(drawn)),
        "is_large": drawn is not None and len(drawn.labels) > MOST_IN_HALF,
        "confusions": [
            (label, predicted, f"{count:,}", f"{share:.1%}")
            for label, predicted, count, share in (list_confusions(confusion, _MOST_CONFUSIONS) if confusion else [])
        ],
        "calibration": calibration and _safe(draw_calibration(calibration)),
        "calibration_error": calibration and f"{calibration.error:.3f}",
        "calibration_of": calibration and calibration.of,
        "classes": [(each, _safe(draw_share(min(max(each.f1, 0.0), 1.0)))) for each in classes[:MOST_CLASSES]],
        "classes_left_out": max(0, len(classes) - MOST_CLASSES),
        "hardest": results.hardest,
        "samples": results.samples,
        "samples_step": f"{results.samples_step:,}",
        "has_before": any(sample.before is not None for sample in results.samples),
    }


def _show_lengths(history: History) -> dict[str, Any]:
    train = describe_data(history).get("train", {})
    counts, longest = train.get("histogram"), train.get("longest")
    if not isinstance(counts, list) or not all(isinstance(count, int) for count in counts) or not any(counts):
        return {"lengths": None, "lengths_note": ""}
    if not isinstance(longest, int) or longest < 1:
        return {"lengths": None, "lengths_note": ""}
    note = f"mean {format_setting(train.get('mean_tokens'))}, longest {longest:,}"
    return {"lengths": _safe(draw_lengths(counts, longest)), "lengths_note": note}


def _mark_safe(charts: Sequence[tuple[str, str, str]]) -> list[tuple[str, str, Any]]:
    return [(title, latest, _safe(chart)) for title, latest, chart in charts]


def _safe(drawing: str) -> Any:
    """A drawing of views/svg.py, which has escaped all text."""
    import markupsafe

    return markupsafe.Markup(drawing)


def _render(template: str, **values: Any) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(generator=GENERATOR, **values)
