"""The trials of a sweep and how each ended: one file in the sweep's folder, from which a stopped sweep goes on."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from onecurve.launcher.errors import NotARun, UsageError
from onecurve.launcher.facts.history import History, estimate_num_steps, find_best, load_history
from onecurve.launcher.sweeps.sweep_file import Sweep
from onecurve.training.atomic_files import write_atomically
from onecurve.training.config import FREE_KEYS
from onecurve.training.launch_protocol import DIVERGED, FINISHED

State = Literal["waiting", "running", "finished", "pruned", "diverged", "failed"]

_FILE = "sweep.json"


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One training of a sweep.

    Attributes:
        settings: keys of the recipe and their values, as texts of the command line.
        values: the sweep's metric at each evaluation, until the one after which it was pruned; None where it is missing.
        value: the metric of the model in final/; None until the trial is finished.
        message: why it failed.
    """

    number: int
    settings: Mapping[str, str]
    state: State = "waiting"
    values: tuple[float | None, ...] = ()
    value: float | None = None
    message: str = ""

    @property
    def is_over(self) -> bool:
        """Whether it has ended for good: no later start of the sweep repeats it. One that failed is made again."""
        return self.state in ("finished", "pruned", "diverged")


def name_run(folder: Path, number: int) -> Path:
    """The run directory of a trial."""
    return folder / f"run_{number:02d}"


def load_trials(sweep: Sweep, overrides: Mapping[str, str], folder: Path) -> list[Trial]:
    """The trials that an earlier start of this sweep has begun.

    Raises:
        UsageError: the folder holds another sweep, or its file is not readable.
    """
    path = folder / _FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        trials = [Trial(**{**trial, "values": tuple(trial["values"])}) for trial in content["trials"]]
        before = content["sweep"]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: can't be read: {error}; restore it, or choose another output_dir") from None
    now = _identify(sweep, overrides)
    differing = [key for key in now if before.get(key) != now[key]]
    if differing:
        raise UsageError(
            f"output_dir {str(folder)!r} holds another sweep: {', '.join(differing)} differs. Choose another output_dir"
        )
    return trials


def save_trials(sweep: Sweep, overrides: Mapping[str, str], folder: Path, trials: Sequence[Trial]) -> None:
    """Write all trials into the sweep's folder, in one step.

    Raises:
        UsageError: the folder is not writable.
    """
    content = {"sweep": _identify(sweep, overrides), "trials": [asdict(trial) for trial in trials]}
    try:
        write_atomically(folder / _FILE, json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise UsageError(f"output_dir {str(folder)!r} can't be written to: {error.strerror}") from None


def _identify(sweep: Sweep, overrides: Mapping[str, str]) -> dict[str, Any]:
    return {**sweep.identify(), "flags": {key: value for key, value in overrides.items() if key not in FREE_KEYS}}


def read_trial(sweep: Sweep, trial: Trial, folder: Path) -> Trial:
    """A trial with what its run directory says: state, and the metric at each evaluation."""
    try:
        history = load_history(name_run(folder, trial.number))
    except NotARun:
        return trial
    code = history.status.get("exit_code")
    message = str(history.status.get("message") or "")
    trial = replace(trial, values=read_values(sweep, history))
    if history.state == "finished" and code == FINISHED:
        value = _find_value(sweep, history)
        if value is None:
            return replace(trial, state="failed", message=f"its last evaluation has no finite {sweep.metric}")
        return replace(trial, state="finished", value=value)
    if history.state == "failed":
        return replace(trial, state="diverged" if code == DIVERGED else "failed", message=message)
    return replace(trial, state="running")


def read_values(sweep: Sweep, history: History) -> tuple[float | None, ...]:
    """The sweep's metric at each evaluation; None where an evaluation has no finite one."""
    return tuple(_read_value(sweep, line) for line in history.evaluations)


def _read_value(sweep: Sweep, evaluation: Mapping[str, Any]) -> float | None:
    value = evaluation.get(sweep.metric)
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def count_evaluations_on_the_way(history: History) -> int:
    """Evaluations without the one after the last step, at which there is nothing left to prune."""
    num_steps = estimate_num_steps(history)
    return sum(num_steps is None or line["step"] < num_steps for line in history.evaluations)


def _find_value(sweep: Sweep, history: History) -> float | None:
    """The metric of the model in final/: the best by metric_for_best_model if the recipe has one, else the last."""
    step = None
    if (chooser := history.settings.get("metric_for_best_model")) is not None:
        best = find_best(history, f"eval_{str(chooser).removeprefix('eval_')}")
        step = best[0] if best is not None else None
    lines = [line for line in history.evaluations if step is None or line["step"] == step]
    return _read_value(sweep, lines[-1]) if lines else None


def rank_trials(sweep: Sweep, trials: Sequence[Trial]) -> list[Trial]:
    """The finished trials, the best value first; of equal ones the first."""
    ended = [(trial.value, trial) for trial in trials if trial.state == "finished" and trial.value is not None]
    ended.sort(key=lambda pair: pair[0], reverse=not sweep.is_lower_better)
    return [trial for _, trial in ended]
