"""Stops a trial that is worse than others were at the same evaluation.

It is stopped as any training is, by a file STOP in its run directory: it writes a checkpoint and ends with exit code 75.
Whether a trial is pruned follows from its evaluations alone, also where the training was quicker than the stop.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from onecurve.launcher.errors import NotARun
from onecurve.launcher.facts.history import MetricsFile, load_history
from onecurve.launcher.sweeps.sweep_file import Sweep
from onecurve.launcher.sweeps.tpe import count_until_pruned
from onecurve.launcher.sweeps.trials import Trial, count_evaluations_on_the_way, read_values
from onecurve.training.run_directory import RunDirectory

# How often the metrics of a running trial are read.
_SECONDS_BETWEEN_LOOKS = 0.5


class Pruning:
    """Looks at the evaluations of a trial while this context is open, and asks it to stop once it is to be pruned.

    Args:
        before: the trials that it is measured against.
        run: the trial's run directory.
    """

    def __init__(self, sweep: Sweep, before: Sequence[Trial], run: Path) -> None:
        self.run = run
        self._sweep = sweep
        self._before = tuple(before)
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="pruning", daemon=True)

    def __enter__(self) -> Pruning:
        if self._sweep.prunes:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        if not self._sweep.prunes:
            return
        self._is_over.set()
        self._thread.join()
        if self._count() is not None:  # It may have ended before it saw the file.
            RunDirectory(self.run).stop.unlink(missing_ok=True)

    def judge(self, trial: Trial) -> Trial:
        """The trial as pruned, if its evaluations say so."""
        if not self._sweep.prunes or trial.state == "diverged" or (count := self._count()) is None:
            return trial
        return replace(trial, state="pruned", values=trial.values[:count], value=None)

    def _look(self) -> None:
        metrics, num_seen = MetricsFile(RunDirectory(self.run).metrics), 0
        while not self._is_over.wait(_SECONDS_BETWEEN_LOOKS):
            num_evaluations = len(metrics.read()["eval"])
            if num_evaluations == num_seen:
                continue
            num_seen = num_evaluations
            if self._count() is not None:
                RunDirectory(self.run).stop.touch()
                return

    def _count(self) -> int | None:
        """After how many of its evaluations the trial is to be stopped; None if it may go on."""
        try:
            history = load_history(self.run)
        except NotARun:
            return None
        values = read_values(self._sweep, history)[: count_evaluations_on_the_way(history)]
        return count_until_pruned(self._sweep, self._before, values)
