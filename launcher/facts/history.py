"""The files of a run directory, parsed: settings, metrics, status, environment."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onecurve.launcher.errors import NotARun, UsageError
from onecurve.training.metric_names import is_lower_better
from onecurve.training.run_directory import RunDirectory
from onecurve.training.schedule import count_steps_of_epochs


@dataclass(frozen=True)
class History:
    """A run directory's files, parsed. They may be half written: the training may be running.

    Attributes:
        sources: where each setting came from: flag, recipe or default.
        steps: a line of metrics.jsonl for each step, in order.
        evaluations: a line for each evaluation of the validation data.
        test: the metrics of the test data; empty if there is none.
    """

    path: Path
    settings: dict[str, Any]
    sources: dict[str, str]
    environment: dict[str, Any]
    status: dict[str, Any]
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    test: dict[str, Any]

    @property
    def state(self) -> str:
        """running, finished, preempted, failed or unknown."""
        return str(self.status.get("state", "unknown"))

    @property
    def topology(self) -> dict[str, Any]:
        """Processes, strategy and device of the last start."""
        content = self.environment.get("topology")
        return content if isinstance(content, dict) else {}

    @property
    def main_metrics(self) -> list[str]:
        """The task's main metrics, without prefix; empty for runs of versions before 0.2."""
        found = self.environment.get("main_metrics")
        return [str(name) for name in found] if isinstance(found, list) else []

    @property
    def num_restarts(self) -> int | None:
        """Starts after the first; None if the training did not count them."""
        count = self.environment.get("num_starts")
        return count - 1 if isinstance(count, int) else None

    @property
    def peak_memory_bytes(self) -> int | None:
        """Peak memory of the process that used most; None if the training did not write it."""
        return max((line["peak_memory_bytes"] for line in self.steps if "peak_memory_bytes" in line), default=None)


def check_run(path: Path) -> RunDirectory:
    """The run directory at that path.

    Raises:
        NotARun: no training has written there.
    """
    if not path.is_dir():
        raise NotARun(f"{str(path)!r} is not a folder; give the output_dir of a training")
    run = RunDirectory(path)
    if not run.config.is_file():
        raise NotARun(
            f"{str(path)!r} has no config.yaml, so it is not a run directory; give the output_dir of a training"
        )
    return run


def check_finished(path: Path) -> RunDirectory:
    """As `check_run`, and refuse a run whose training has not finished.

    Raises:
        NotARun: as `check_run`.
        UsageError: it has no final model.
    """
    run = check_run(path)
    if not run.final.is_dir():
        raise UsageError(f"{str(path)!r} has no final/: its training has not finished")
    return run


def load_history(path: Path, metrics: MetricsFile | None = None) -> History:
    """Read a run directory.

    Args:
        metrics: the run's metrics file, for a caller that reads it repeatedly.

    Raises:
        NotARun: no training has written there.
    """
    import yaml

    run = check_run(path)
    try:
        text = run.config.read_text(encoding="utf-8")
        settings = yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise NotARun(f"{run.config} can't be read: {error}") from None
    lines = (metrics or MetricsFile(run.metrics)).read()
    return History(
        path,
        settings if isinstance(settings, dict) else {},
        dict(re.findall(r"^(\w+): .*  # (\w+)$", text, re.MULTILINE)),
        read_json(run.environment),
        read_json(run.status),
        list(lines["train"].values()),
        list(lines["eval"].values()),
        next(reversed(lines["test"].values()), {}),
    )


class MetricsFile:
    """metrics.jsonl, by event and step. Reading it again reads only what was added."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._forget()

    def _forget(self) -> None:
        self._lines: dict[str, dict[int, dict[str, Any]]] = {"train": {}, "eval": {}, "test": {}}
        self._end = 0  # Of the last complete line.
        self._last = b""

    def read(self) -> dict[str, dict[int, dict[str, Any]]]:
        """All complete lines; the last one of the file may be half written."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._end - len(self._last))
                new = file.read()
                if not new.startswith(self._last):  # A resume has truncated the file.
                    self._forget()
                    file.seek(0)
                    new = file.read()
        except OSError:
            self._forget()
            return self._lines
        new = new[len(self._last) : new.rfind(b"\n") + 1]
        for row in new.splitlines(keepends=True):
            self._last = row
            self._note(row)
        self._end += len(new)
        return self._lines

    def _note(self, row: bytes) -> None:
        try:
            line = json.loads(row.decode("utf-8", errors="replace"))
        except ValueError:
            return
        if isinstance(line, dict) and line.get("event") in self._lines and isinstance(line.get("step"), int):
            self._lines[line["event"]][line["step"]] = line


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is none, or it can't be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def count_seconds(steps: Sequence[dict[str, Any]]) -> float:
    """Seconds of all steps, without evaluations, saves and starts."""
    return float(sum(line["tokens"] / line["tokens_per_second"] for line in steps if line.get("tokens_per_second")))


def count_device_hours(history: History) -> float:
    """Hours of all steps times the number of processes of the last start, also for steps made with another number."""
    return count_seconds(history.steps) / 3600 * int(history.topology.get("num_processes") or 1)


def estimate_num_steps(history: History) -> int | None:
    """Steps of the whole training: the recipe's, or its epochs times the steps of an epoch, which the last line implies.

    The training counts steps from its number of examples, which the run directory does not hold.
    """
    if history.settings.get("max_train_steps"):
        return int(history.settings["max_train_steps"])
    epochs = float(history.settings.get("num_train_epochs") or 0)
    if not history.steps or not history.steps[-1].get("epoch") or not epochs:
        return None
    # Epochs are rounded to 4 digits, so the last line gives the most exact ratio.
    line = history.steps[-1]
    return count_steps_of_epochs(epochs, round(line["step"] / line["epoch"]))


def find_best(history: History, metric: str) -> tuple[int, float] | None:
    """Step and value of the best evaluation by one metric."""
    found = [(line["step"], line[metric]) for line in history.evaluations if is_metric(metric, line.get(metric))]
    if not found:
        return None
    return (min if is_lower_better(metric) else max)(found, key=lambda pair: pair[1])


def list_metrics(histories: Sequence[History]) -> list[str]:
    """Names of all metrics of the evaluations, in the order in which they appear."""
    lines = [line for history in histories for line in history.evaluations]
    return list(dict.fromkeys(name for line in lines for name, value in line.items() if is_metric(name, value)))


def is_metric(name: str, value: object) -> bool:
    """Whether an entry of an evaluation's line is a metric."""
    return name.startswith("eval_") and isinstance(value, (int, float))
