"""`onecurve compare`: several runs side by side, read from their run directories."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onecurve.launcher.facts.history import (
    History,
    count_device_hours,
    count_seconds,
    find_best,
    list_metrics,
)
from onecurve.launcher.units import format_gib, format_result, format_seconds, format_setting
from onecurve.training.metric_names import is_lower_better, pick_main_metrics

if TYPE_CHECKING:
    from rich.console import Console

# These do not change what is trained.
_NOT_SETTINGS = frozenset({"output_dir", "resume"})


def build_comparison(histories: Sequence[History]) -> dict[str, Any]:
    """Settings that differ, final and best metrics, and cost; each value is a list with one entry per run."""
    keys = sorted({key for history in histories for key in history.settings} - _NOT_SETTINGS)
    settings = {key: [history.settings.get(key) for history in histories] for key in keys}
    for key in ("strategy", "num_processes", "device"):
        settings[f"({key})"] = [history.topology.get(key) for history in histories]
    names = list_metrics(histories)
    last = [history.evaluations[-1] if history.evaluations else {} for history in histories]
    best = {name: [find_best(history, name) for history in histories] for name in names}
    return {
        "main_metrics": next((history.main_metrics for history in histories if history.main_metrics), []),
        "runs": name_runs([history.path for history in histories]),
        "state": [history.state for history in histories],
        "steps": [history.steps[-1]["step"] if history.steps else 0 for history in histories],
        "differing_settings": {key: row for key, row in settings.items() if any(value != row[0] for value in row)},
        "final": {
            "loss": [history.steps[-1]["loss"] if history.steps else None for history in histories],
            **{name: [line.get(name) for line in last] for name in names},
        },
        "best": {
            name: [None if pair is None else {"value": pair[1], "step": pair[0]} for pair in row]
            for name, row in best.items()
        },
        "cost": {
            "tokens": [sum(line.get("tokens", 0) for line in history.steps) for history in histories],
            "training_seconds": [round(count_seconds(history.steps), 1) for history in histories],
            "device_hours": [round(count_device_hours(history), 4) for history in histories],
            "peak_memory_bytes": [history.peak_memory_bytes for history in histories],
            "restarts": [history.num_restarts for history in histories],
        },
    }


def name_runs(paths: Sequence[Path]) -> list[str]:
    """The folders' names, or their paths where names are the same."""
    names = [path.name for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def print_comparison(console: Console, comparison: dict[str, Any]) -> None:
    """Print one table: settings that differ, the main metrics, the cost. The best value of each metric is bold."""
    from rich.table import Table

    table = Table()
    table.add_column("")
    for name in comparison["runs"]:
        table.add_column(name, overflow="fold")
    table.add_row("state", *map(str, comparison["state"]))
    table.add_row("steps", *map(str, comparison["steps"]), end_section=True)
    differing = list(comparison["differing_settings"].items())
    for number, (key, row) in enumerate(differing, start=1):
        table.add_row(key, *map(_show_setting, row), end_section=number == len(differing))
    names = pick_main_metrics(list(comparison["best"]), comparison["main_metrics"])
    for name in ("loss", *names):
        table.add_row(f"final {name}", *_mark_best(name, comparison["final"][name]))
    for name in names:
        row = comparison["best"][name]
        if has_other_best(comparison, name):
            shown = [f"{entry['value']:.4f} at {entry['step']}" if entry else "-" for entry in row]
            table.add_row(f"best {name}", *shown)
    table.add_section()
    for name, row in comparison["cost"].items():
        if any(value is not None for value in row):
            table.add_row(*describe_cost(name, row))
    console.print(table)


def describe_cost(name: str, row: Sequence[Any]) -> list[str]:
    """A row of the table: what it is, and the value of each run."""
    if name == "training_seconds":
        return ["training time", *map(format_seconds, row)]
    if name == "peak_memory_bytes":
        return ["peak memory", *("-" if value is None else f"{format_gib(value)} GiB" for value in row)]
    return [name.replace("_", " "), *map(format_result, row)]


def has_other_best(comparison: Mapping[str, Any], name: str) -> bool:
    """Whether the best value of a metric is, for one run at least, not that of the last evaluation."""
    pairs = zip(comparison["best"][name], comparison["final"][name], strict=True)
    return any(entry is not None and entry["value"] != last for entry, last in pairs)


def _mark_best(name: str, row: Sequence[Any]) -> list[str]:
    return [f"[bold]{value}[/bold]" if is_best else value for value, is_best in find_best_cells(name, row)]


def find_best_cells(name: str, row: Sequence[Any]) -> list[tuple[str, bool]]:
    """Each value of a metric as it is shown, and whether it is the best; none is where all are the same."""
    numbers = [value for value in row if isinstance(value, (int, float))]
    best = (min if is_lower_better(name) else max)(numbers, default=None)
    differ = len(set(numbers)) > 1
    return [(format_result(value), differ and value == best) for value in row]


def _show_setting(value: object) -> str:
    return format_setting(value).replace("[", "\\[")  # rich would read [a] as a style
