"""`onecurve compare`: runs side by side, from their directories alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.history import History

if TYPE_CHECKING:
    from rich.console import Console

# Where a run lies is not how it was trained.
_NOT_SETTINGS = frozenset({"output_dir", "resume"})


def build_comparison(histories: Sequence[History]) -> dict[str, Any]:
    """Settings that differ, final and best metrics, and cost; each value a list with an entry for each run."""
    keys = sorted({key for history in histories for key in history.settings} - _NOT_SETTINGS)
    settings = {key: [history.settings.get(key) for history in histories] for key in keys}
    topologies = [history.environment.get("topology", {}) for history in histories]
    for key in ("strategy", "num_processes", "device"):
        settings[f"({key})"] = [topology.get(key) for topology in topologies]
    names = list(dict.fromkeys(name for history in histories for name in _metric_names(history)))
    last = [history.evaluations[-1] if history.evaluations else {} for history in histories]
    return {
        "runs": _name_runs([history.path for history in histories]),
        "state": [history.status.get("state", "unknown") for history in histories],
        "steps": [history.steps[-1]["step"] if history.steps else 0 for history in histories],
        "differing_settings": {key: row for key, row in settings.items() if any(value != row[0] for value in row)},
        "final": {
            "loss": [history.steps[-1]["loss"] if history.steps else None for history in histories],
            **{name: [line.get(name) for line in last] for name in names},
        },
        "best": {name: [_best(history, name) for history in histories] for name in names},
        "cost": {
            "tokens": [sum(line.get("tokens", 0) for line in history.steps) for history in histories],
            "training_seconds": [round(count_seconds(history.steps), 1) for history in histories],
            "device_hours": [
                round(count_seconds(history.steps) * (topology.get("num_processes") or 1) / 3600, 4)
                for history, topology in zip(histories, topologies, strict=True)
            ],
        },
    }


def _name_runs(paths: Sequence[Path]) -> list[str]:
    names = [path.name for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def _metric_names(history: History) -> list[str]:
    return [name for line in history.evaluations for name, value in line.items() if _is_metric(name, value)]


def _is_metric(name: str, value: object) -> bool:
    return name.startswith("eval_") and isinstance(value, (int, float))


def falls(name: str) -> bool:
    """Whether a metric gets better by falling."""
    return name.endswith(("loss", "mse", "mae", "rmse"))


def _best(history: History, name: str) -> dict[str, Any] | None:
    lines = [line for line in history.evaluations if _is_metric(name, line.get(name))]
    if not lines:
        return None
    best = (min if falls(name) else max)(lines, key=lambda line: line[name])
    return {"value": best[name], "step": best["step"]}


def count_seconds(steps: Sequence[dict[str, Any]]) -> float:
    """Seconds of all steps; evaluations, saves and starts are not in it."""
    return float(sum(line["tokens"] / line["tokens_per_second"] for line in steps if line.get("tokens_per_second")))


def print_comparison(console: Console, comparison: dict[str, Any]) -> None:
    """One table: settings that differ, then results, then cost. The better value of each metric is bold."""
    from rich.table import Table

    table = Table()
    table.add_column("")
    for name in comparison["runs"]:
        table.add_column(name, overflow="fold")
    table.add_row("state", *map(str, comparison["state"]))
    table.add_row("steps", *map(str, comparison["steps"]), end_section=True)
    differing = list(comparison["differing_settings"].items())
    for number, (key, row) in enumerate(differing, start=1):
        table.add_row(key, *map(_show, row), end_section=number == len(differing))
    for name, row in comparison["final"].items():
        table.add_row(f"final {name}", *_mark_best(name, row))
    for name, row in comparison["best"].items():
        if _has_other_best(comparison, name):
            shown = [f"{entry['value']:.4f} at {entry['step']}" if entry else "-" for entry in row]
            table.add_row(f"best {name}", *shown)
    table.add_section()
    for name, row in comparison["cost"].items():
        table.add_row(name.replace("_", " "), *map(_show, row))
    console.print(table)


def _has_other_best(comparison: dict[str, Any], name: str) -> bool:
    pairs = zip(comparison["best"][name], comparison["final"][name], strict=True)
    return any(entry is not None and entry["value"] != last for entry, last in pairs)


def _mark_best(name: str, row: Sequence[Any]) -> list[str]:
    numbers = [value for value in row if isinstance(value, (int, float))]
    best = (min if falls(name) else max)(numbers, default=None)
    differ = len(set(numbers)) > 1
    return [f"[bold]{_show(value)}[/bold]" if differ and value == best else _show(value) for value in row]


def _show(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value).replace("[", "\\[")
