"""Trainings one after the other in one process, which saves their starts, and what is only seen from within.

    python -m benchmarks.gpu.child REQUEST.json ANSWER.json

The request is a list of recipes. The answer has for each: exit_code, seconds; waits (how often the host waited for the GPU in
`steps_watched` steps, by place; None without CUDA); saves, each with seconds_blocked and seconds; peak_bytes.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from onecurve.training import run
from onecurve.training.outcome import report_outcome
from onecurve.training.parallel.accelerator import forget_state
from onecurve.training.recovery.checkpoint_writer import CheckpointWriter
from onecurve.training.session import Session
from tools.trainings import to_flags

# The first steps compile, and set up what stays.
STEPS_BEFORE = 3


@dataclass
class Watcher:
    """Counts the waits of steps, and times the saves."""

    steps: int = 0
    waits: Counter[str] = field(default_factory=Counter)
    saves: list[dict[str, float]] = field(default_factory=list)

    def conclude_step(self, session: Session, native: Any) -> Any:
        """Evaluations and saves may wait: they are not watched."""
        self._set_mode("default")
        evaluation = native(session)
        if session.progress.step >= STEPS_BEFORE:
            self.steps += 1
            self._set_mode("warn")
        return evaluation

    def save(self, writer: CheckpointWriter, native: Any, arguments: Sequence[Any]) -> None:
        """How long the training stands still for a save."""
        started = time.perf_counter()
        native(writer, *arguments)
        self.saves.append({"seconds_blocked": time.perf_counter() - started})

    def write(self, writer: CheckpointWriter, native: Any, arguments: Sequence[Any]) -> None:
        """How long the thread behind a save takes until the checkpoint is complete, after the copy."""
        started = time.perf_counter()
        native(writer, *arguments)
        self.saves[-1]["seconds"] = self.saves[-1]["seconds_blocked"] + time.perf_counter() - started

    def stop(self) -> None:
        """Watch no more."""
        self._set_mode("default")

    def _set_mode(self, mode: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode(mode)


def train(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Train one recipe, and say what was seen."""
    watcher = Watcher()
    conclude, save, write = run.conclude_step, CheckpointWriter.save, CheckpointWriter._write
    run.conclude_step = lambda session: watcher.conclude_step(session, conclude)
    CheckpointWriter.save = lambda writer, *more: watcher.save(writer, save, more)  # type: ignore[method-assign]
    CheckpointWriter._write = lambda writer, *more: watcher.write(writer, write, more)  # type: ignore[method-assign]
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            exit_code = report_outcome(run.main, to_flags(settings))
    finally:
        watcher.stop()
        run.conclude_step, CheckpointWriter.save, CheckpointWriter._write = conclude, save, write  # type: ignore[method-assign]
        for session in run._KEPT:
            session.stop_flag.close()
        run._KEPT.clear()
        forget_state()
    watcher.waits.update(
        f"{Path(each.filename).name}:{each.lineno}" for each in told if "synchronizing" in str(each.message)
    )
    has_cuda = torch.cuda.is_available()
    return {
        "exit_code": exit_code,
        "seconds": time.perf_counter() - started,
        "waits": dict(watcher.waits) if has_cuda else None,
        "steps_watched": watcher.steps,
        "saves": watcher.saves,
        "peak_bytes": torch.cuda.max_memory_allocated() if has_cuda else None,
    }


def main(arguments: Sequence[str]) -> None:
    """Train what is asked for."""
    request = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    answer = [train(settings) for settings in request]
    Path(arguments[1]).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
