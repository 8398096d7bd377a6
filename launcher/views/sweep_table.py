"""The results of a sweep: a row for each trial, the best one marked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onecurve.launcher.sweeps.sweep_file import Sweep
from onecurve.launcher.sweeps.trials import Trial, name_run, rank_trials
from onecurve.launcher.units import format_result

if TYPE_CHECKING:
    from rich.console import Console


def build_results(sweep: Sweep, folder: Path, trials: Sequence[Trial]) -> dict[str, Any]:
    """The trials with their run directories; `ranking` has the numbers of the finished ones, the best first."""
    ranking = [trial.number for trial in rank_trials(sweep, trials)]
    return {
        "metric": sweep.metric,
        "mode": "min" if sweep.is_lower_better else "max",
        "num_trials": sweep.num_trials,
        "best": ranking[0] if ranking else None,
        "ranking": ranking,
        "trials": [
            {
                "number": trial.number,
                "run": str(name_run(folder, trial.number)),
                "state": trial.state,
                "value": trial.value,
                "values": list(trial.values),
                "settings": dict(trial.settings),
                "message": trial.message,
            }
            for trial in trials
        ],
    }


def list_best_runs(results: dict[str, Any], most: int) -> list[Path]:
    """Run directories of the best finished trials, at most `most`."""
    runs = {trial["number"]: Path(trial["run"]) for trial in results["trials"]}
    return [runs[number] for number in results["ranking"][:most]]


def print_results(console: Console, results: dict[str, Any]) -> None:
    """Print a table with a row for each trial; the best one is bold. Below it, why trials failed."""
    from rich.markup import escape
    from rich.table import Table

    keys = list(dict.fromkeys(key for trial in results["trials"] for key in trial["settings"]))
    table = Table()
    for name in ("trial", "state", results["metric"], *keys):
        table.add_column(escape(name), overflow="fold")
    for trial in results["trials"]:
        cells = [Path(trial["run"]).name, trial["state"], _show_value(trial)]
        cells += [trial["settings"].get(key, "") for key in keys]
        table.add_row(*map(escape, cells), style="bold" if trial["number"] == results["best"] else "")
    console.print(table)
    for trial in results["trials"]:
        if trial["message"]:
            line = f"{Path(trial['run']).name} {trial['state']}: {trial['message']}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    if results["best"] is not None:
        best = next(trial for trial in results["trials"] if trial["number"] == results["best"])
        line = f"best: {best['run']}, {results['metric']} {format_result(best['value'])}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _show_value(trial: dict[str, Any]) -> str:
    if trial["value"] is not None:
        return format_result(trial["value"])
    known = [value for value in trial["values"] if value is not None]
    return f"({format_result(known[-1])})" if known else ""
