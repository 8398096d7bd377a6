"""The state of a run at one moment, from its run directory and Slurm's queue."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onecurve.launcher.cluster.queue import QueueState
from onecurve.launcher.facts.history import MetricsFile, count_seconds, estimate_num_steps, load_history
from onecurve.training.launch_protocol import BAD_INPUT, DIVERGED
from onecurve.training.run_directory import RunDirectory

_RATE_STEPS = 20
# An evaluation or a save may take minutes; a training without output for longer has probably been killed.
_STALE_SECONDS = 600.0
_STALE_STEPS = 50
# From a failure to the first output of the processes that the launcher starts after it.
_SECONDS_TO_RESTART = 180.0

# Returns the state of a run's job in the queue; None if it has none.
Queue = Callable[[Path], QueueState | None]


@dataclass(frozen=True)
class View:
    """The state of a run at one moment.

    Attributes:
        state: running, finished, preempted, failed or unknown.
        num_steps: of the whole training; None if it is not known yet.
        seconds_left: at the present rate; None if unknown.
        seconds_silent: since the last line was written, while the state is running.
        is_stale: it has been silent for so long that the training has probably been killed.
        peak_memory_bytes: of the process that used most; None if the training did not write it.
        num_restarts: starts after the first; None if they were not counted.
        restarts_left: how often the launcher will still restart it after a failure; 0 if it should already have done so.
        queue_state: of the run's Slurm job, in one line.
        is_over: it has ended, and neither the launcher nor Slurm will start it again.
        losses: of every step so far.
    """

    run: str
    state: str
    message: str
    step: int
    num_steps: int | None
    epoch: float
    loss: float | None
    learning_rate: float | None
    grad_norm: float | None
    tokens_per_second: float | None
    padding: float | None
    seconds_left: float | None
    seconds_silent: float | None
    is_stale: bool
    peak_memory_bytes: int | None
    num_restarts: int | None
    restarts_left: int
    last_evaluation: dict[str, Any]
    main_metrics: list[str]
    best_loss: float | None
    queue_state: str | None
    is_over: bool
    losses: list[float] = field(repr=False, default_factory=list)


def build_view(
    run: Path, queue: Queue | None = None, now: float | None = None, metrics: MetricsFile | None = None
) -> View:
    """Read the run directory once.

    Args:
        now: seconds since 1970; by default the present time.
        metrics: the run's metrics file, for a caller that reads it repeatedly.

    Raises:
        NotARun: no training has written there.
    """
    history = load_history(run, metrics)
    last = history.steps[-1] if history.steps else {}
    recent = history.steps[-_RATE_STEPS:]
    seconds = count_seconds(recent)
    num_steps = estimate_num_steps(history)
    is_running = history.state == "running"
    step = last.get("step", 0)
    left = silent = None
    if is_running and num_steps is not None and recent:
        left = max(0, num_steps - step) * seconds / len(recent)
    directory = RunDirectory(run)
    files = [directory.metrics, directory.status, directory.environment]
    written = max((path.stat().st_mtime for path in files if path.exists()), default=0.0)
    now = time.time() if now is None else now
    since = max(0.0, now - written)
    if is_running:
        silent = since
    restarts_left = int(history.status.get("restarts_left", 0)) if since < _SECONDS_TO_RESTART else 0
    job = queue(run) if queue is not None else None
    # After micro-batches that did not fit, the launcher starts again with smaller ones.
    shrunk = directory.memory.stat().st_mtime if directory.memory.exists() else 0.0
    has_shrunk = history.state == "failed" and now - shrunk < _SECONDS_TO_RESTART
    # Bad input and a divergence would repeat, so there is no restart.
    can_go_on = history.state != "finished" and history.status.get("exit_code") not in (BAD_INPUT, DIVERGED)
    will_go_on = can_go_on and ((job is not None and not job.is_over) or restarts_left > 0 or has_shrunk)
    return View(
        run=str(run),
        state=history.state,
        message=history.status.get("message", ""),
        step=step,
        num_steps=num_steps,
        epoch=last.get("epoch", 0.0),
        loss=last.get("loss"),
        learning_rate=last.get("learning_rate"),
        grad_norm=last.get("grad_norm"),
        tokens_per_second=sum(line["tokens"] for line in recent) / seconds if seconds else None,
        padding=last.get("padding"),
        seconds_left=left,
        seconds_silent=silent,
        is_stale=silent is not None and silent > max(_STALE_SECONDS, _STALE_STEPS * seconds / max(1, len(recent))),
        peak_memory_bytes=history.peak_memory_bytes,
        num_restarts=history.num_restarts,
        restarts_left=restarts_left,
        main_metrics=history.main_metrics,
        last_evaluation=history.evaluations[-1] if history.evaluations else {},
        best_loss=min((line["eval_loss"] for line in history.evaluations if "eval_loss" in line), default=None),
        queue_state=None if job is None else job.describe(),
        is_over=history.state not in ("running", "unknown") and not will_go_on,
        losses=[line["loss"] for line in history.steps],
    )
