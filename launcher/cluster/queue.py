"""Slurm's queue: the state of a job, its run directory, and how to end it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from onecurve.launcher.cluster.commands import run_slurm
from onecurve.launcher.cluster.jobs import COMMENT, find_job_id, parse_job_id
from onecurve.launcher.errors import LaunchFailed, Unsuitable, UsageError
from onecurve.launcher.sweeps.trials import name_run

_COMMENT_WIDTH = 4096
# squeue's fields and their widths.
_FIELDS = {"State": 30, "Reason": 80, "RestartCnt": 12, "TimeLeft": 24, "NodeList": 400}
_ENDED = frozenset(
    {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT"}
)


@dataclass(frozen=True)
class QueueState:
    """The state of a job in Slurm's queue.

    Attributes:
        state: PENDING, RUNNING, COMPLETING, COMPLETED, FAILED, CANCELLED, TIMEOUT, ...
        reason: why it waits or has ended; "None" if Slurm gives none.
        num_restarts: how often it was queued again.
        nodes: a host list; empty while the job waits.
        time_left: until its time limit, as Slurm writes it.
    """

    job_id: str
    state: str
    reason: str
    num_restarts: int
    nodes: str
    time_left: str

    @property
    def is_over(self) -> bool:
        """Whether it has ended for good."""
        return self.state in _ENDED

    def describe(self) -> str:
        """One line for people to read."""
        words = [f"Slurm job {self.job_id}: {self.state}"]
        if self.reason not in ("", "None"):
            words.append(f"({self.reason})")
        if self.nodes:
            words.append(f"on {self.nodes}")
        if self.state == "RUNNING":
            words.append(f"for {self.time_left} more")
        text = " ".join(words)
        if self.num_restarts:
            text += f"; queued again {self.num_restarts} time{'s' * (self.num_restarts != 1)}"
        return text


def find_job(target: str | Path) -> QueueState | None:
    """The state of a job, given its number or its run directory; for an array, of its first task that is not over.

    Returns:
        None if there is no Slurm, it does not answer, or it does not know the job any more.
    """
    job_id = find_job_id(target)
    if job_id is None or shutil.which("squeue") is None:
        return None
    form = ",".join(f"{name}:{width}" for name, width in _FIELDS.items())
    try:
        result = run_slurm(["squeue", "--noheader", "--states=all", f"--jobs={job_id}", f"--Format={form}"])
    except (LaunchFailed, Unsuitable):
        return None
    lines = [line for line in result.stdout.splitlines() if line.strip()]
    if result.returncode != 0 or not lines:
        return None
    return pick_task([parse_queue_line(job_id, line) for line in lines])


def pick_task(tasks: Sequence[QueueState]) -> QueueState:
    """The task whose state stands for the array's: the first that is not over, if there is one."""
    return next((task for task in tasks if not task.is_over), tasks[0])


def find_run(job_id: str) -> Path | None:
    """The run directory of a job that `submit` sent; for a task of an array its own, for an array the folder of all.

    Returns:
        None if `submit` did not send it, or Slurm does not know it.
    """
    number, _, task = job_id.partition("_")
    if parse_job_id(job_id) is None or shutil.which("squeue") is None:
        return None
    try:
        result = run_slurm(
            ["squeue", "--noheader", "--states=all", f"--jobs={number}", f"--Format=Comment:{_COMMENT_WIDTH}"]
        )
    except (LaunchFailed, Unsuitable):
        return None
    comment = next(iter(result.stdout.splitlines()), "").rstrip()
    if not comment.startswith(COMMENT):
        return None
    folder = Path(comment.removeprefix(COMMENT))
    return name_run(folder, int(task)) if task else folder


def parse_queue_line(job_id: str, line: str) -> QueueState:
    """Parse a line of squeue, which has columns of fixed width."""
    values, start = [], 0
    for width in _FIELDS.values():
        values.append(line[start : start + width].strip())
        start += width
    state, reason, restarts, time_left, nodes = values
    return QueueState(job_id, state, reason, int(restarts or 0), nodes, time_left)


def cancel_job(target: str | Path) -> str:
    """Cancel a job; its training writes a checkpoint if KillWait is long enough. Returns the job's number.

    Raises:
        UsageError: there is no such job.
    """
    job_id = find_job_id(target)
    if job_id is None:
        raise UsageError(f"{str(target)!r} is neither a job's number nor the run directory of a job")
    state = find_job(job_id)
    if state is not None and state.is_over:
        raise UsageError(f"job {job_id} has already ended: {state.state}")
    result = run_slurm(["scancel", job_id])
    if result.returncode != 0:
        raise UsageError(f"job {job_id} could not be canceled: {' '.join(result.stderr.split())}")
    return job_id
