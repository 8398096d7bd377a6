"""A sweep in a folder, and a training that writes what a real one leaves, in no time."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from onecurve.launcher.launching.ending import Ending
from onecurve.launcher.sweeps.search import Search, SweepEnding
from onecurve.launcher.sweeps.sweep_file import Sweep, load_sweep

WriteSweep = Callable[..., Path]

NUM_EVALUATIONS = 3


@pytest.fixture
def write_sweep(recipe_file: Path, tmp_path: Path) -> WriteSweep:
    """Write a sweep file; keys of None are left out: write_sweep(strategy="random", num_trials=3)."""

    def write(name: str = "sweep.yaml", **keys: Any) -> Path:
        grid = {"strategy": "grid", "parameters": {"learning_rate": [1e-4, 1e-3], "seed": [1, 2]}}
        content = {"recipe": str(recipe_file), "metric": "accuracy", **grid, **keys}
        path = tmp_path / name
        path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
        return path

    return write


class Trainings:
    """Trainings that take no time: `curve` gives the accuracy at each evaluation from a trial's overrides.

    Attributes:
        made: the overrides of each start.
        endings: by the name of a run directory, how the next training there ends before its second evaluation.
    """

    def __init__(self, curve: Callable[[Mapping[str, str]], list[float]]) -> None:
        self.curve = curve
        self.made: list[dict[str, str]] = []
        self.endings: dict[str, int] = {}

    def __call__(self, overrides: Mapping[str, str]) -> Ending:
        self.made.append(dict(overrides))
        run = Path(overrides["output_dir"])
        code = self.endings.pop(run.name, 0)
        if code == 2:
            return Ending(2, "a wrong key")
        run.mkdir(parents=True, exist_ok=True)
        (run / "config.yaml").write_text(f"max_train_steps: {NUM_EVALUATIONS}\n", encoding="utf-8")
        values = self.curve(overrides)[: 1 if code else None]
        lines = [
            {"event": event, "step": step, "epoch": 1.0, "loss": 1.0, "eval_accuracy": value}
            for step, value in enumerate(values, start=1)
            for event in ("train", "eval")
        ]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        state = {0: "finished", 75: "preempted"}.get(code, "failed")
        status = {"state": state, "exit_code": code, "step": len(values), "message": "" if code == 0 else "a cause"}
        (run / "status.json").write_text(json.dumps(status), encoding="utf-8")
        return Ending(code)

    @property
    def names(self) -> list[str]:
        """Names of the run directories, one for each start."""
        return [Path(overrides["output_dir"]).name for overrides in self.made]


Start = Callable[..., SweepEnding]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Start a sweep in the folder `sweep`, or go on with it: start(path, trainings, seed="3")."""

    def run(sweep: Path | Sweep, trainings: Callable[[Mapping[str, str]], Ending], **overrides: str) -> SweepEnding:
        found = load_sweep(sweep) if isinstance(sweep, Path) else sweep
        return Search(found, overrides, tmp_path / "sweep", trainings, lambda line: None).run()

    return run
