"""`onecurve watch`: a run as it goes, from its directory alone, so that it works across machines that share a disk."""

from __future__ import annotations

import itertools
import math
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.compare import count_seconds
from launcher.history import History, load_history
from launcher.plan_table import format_seconds

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

_RATE_STEPS = 20
_BLOCKS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class View:
    """What is known of a run at one moment.

    Attributes:
        state: running, finished, preempted, failed or unknown.
        num_steps: of the whole training; None where the run directory does not tell.
        seconds_left: at the present rate; None where it can't be told.
        losses: of every step so far.
        seconds_silent: since the last line was written.
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
    last_evaluation: dict[str, Any]
    best_loss: float | None
    slurm_state: str | None
    losses: list[float] = field(repr=False, default_factory=list)


def build_view(run: Path, now: float | None = None) -> View:
    """Read the run directory once.

    Raises:
        NotARun: no training has written there.
    """
    history = load_history(run)
    last = history.steps[-1] if history.steps else {}
    recent = history.steps[-_RATE_STEPS:]
    seconds = count_seconds(recent)
    num_steps = count_steps(history)
    per_step = seconds / len(recent) if recent else None
    is_running = history.status.get("state") == "running"
    step = last.get("step", 0)
    left = None
    if is_running and num_steps is not None and per_step is not None:
        left = max(0, num_steps - step) * per_step
    metrics = run / "metrics.jsonl"
    silent = (time.time() if now is None else now) - metrics.stat().st_mtime if metrics.exists() else None
    return View(
        run=str(run),
        state=history.status.get("state", "unknown"),
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
        seconds_silent=silent if is_running else None,
        last_evaluation=history.evaluations[-1] if history.evaluations else {},
        best_loss=min((line["eval_loss"] for line in history.evaluations if "eval_loss" in line), default=None),
        slurm_state=ask_slurm(history.environment.get("topology", {}).get("slurm_job_id")),
        losses=[line["loss"] for line in history.steps],
    )


def count_steps(history: History) -> int | None:
    """Steps of the whole training: the recipe's, or its epochs times what an epoch has turned out to be."""
    if history.settings.get("max_train_steps"):
        return int(history.settings["max_train_steps"])
    epochs = float(history.settings.get("num_train_epochs") or 0)
    if not history.steps or not history.steps[-1].get("epoch") or not epochs:
        return None
    # Epochs are rounded to 4 digits, so the longest one tells the steps of an epoch best.
    line = history.steps[-1]
    steps = epochs * line["step"] / line["epoch"]
    return math.ceil(round(float(steps), 2))


def ask_slurm(job_id: str | None) -> str | None:
    """A job's state in squeue's words; None without Slurm or when the job has left the queue."""
    if not job_id or shutil.which("squeue") is None:
        return None
    try:
        result = subprocess.run(
            ["squeue", "--noheader", "--jobs", job_id, "--format", "%T"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip().splitlines()[0] if result.stdout.strip() else None


def draw_curve(values: Sequence[float], width: int, height: int = 8) -> list[str]:
    """A curve in block characters: `height` lines of `width` columns, each column the mean of its share of the values."""
    values = [value for value in values if math.isfinite(value)]
    if not values:
        return []
    width = min(width, len(values))
    edges = [round(number * len(values) / width) for number in range(width + 1)]
    means = [
        sum(values[start:stop]) / (stop - start) for start, stop in itertools.pairwise(edges)
    ]  # fmt: skip
    lowest, highest = min(means), max(means)
    spread = (highest - lowest) or 1.0
    levels = [1 + round((mean - lowest) / spread * (height * 8 - 1)) for mean in means]
    lines = []
    for row in range(height - 1, -1, -1):
        cells = [min(8, max(0, level - row * 8)) for level in levels]
        label = f"{highest:8.4f} ┤" if row == height - 1 else f"{lowest:8.4f} ┤" if row == 0 else "         │"
        lines.append(label + "".join(" " if cell == 0 else _BLOCKS[cell - 1] for cell in cells))
    return lines


def render(view: View, width: int = 72) -> RenderableType:
    """A panel for the terminal."""
    from rich.panel import Panel
    from rich.text import Text

    total = f" of {view.num_steps:,}" if view.num_steps else ""
    lines = [f"step {view.step:,}{total}   epoch {view.epoch:.2f}"]
    if view.seconds_left is not None:
        lines[0] += f"   {format_seconds(view.seconds_left)} left"
    if view.loss is not None:
        lines.append(
            f"loss {view.loss:.4f}   lr {view.learning_rate or 0:.2e}   gradient norm {view.grad_norm or 0:.3f}   "
            f"{view.tokens_per_second or 0:,.0f} tokens/s   padding {view.padding or 0:.1%}"
        )
    if view.last_evaluation:
        shown = [(name, value) for name, value in view.last_evaluation.items() if name.startswith("eval_")][:4]
        lines.append(
            f"evaluation after step {view.last_evaluation['step']}: "
            + "  ".join(f"{name.removeprefix('eval_')} {value:.4f}" for name, value in shown)
        )
    if view.slurm_state is not None:
        lines.append(f"Slurm says {view.slurm_state}")
    if view.seconds_silent is not None and view.seconds_silent > 60:
        lines.append(f"nothing written for {format_seconds(view.seconds_silent)}: it evaluates, saves, or is gone")
    if view.message:
        lines.append(view.message)
    curve = draw_curve(view.losses, width)
    text = Text("\n".join([*lines, "", *curve]) if curve else "\n".join(lines))
    colors = {"running": "green", "finished": "blue", "preempted": "yellow", "failed": "red"}
    return Panel(text, title=f"{view.state}  {view.run}", border_style=colors.get(view.state, "white"), expand=False)


def follow(console: Console, run: Path, every_seconds: float) -> None:
    """Draw again and again until the run has ended or the user has seen enough."""
    from rich.live import Live

    view = build_view(run)
    try:
        with Live(render(view, _width(console)), console=console, refresh_per_second=4) as live:
            while view.state in ("running", "unknown"):
                time.sleep(every_seconds)
                view = build_view(run)
                live.update(render(view, _width(console)))
    except KeyboardInterrupt:
        return


def _width(console: Console) -> int:
    return max(20, console.width - 16)
