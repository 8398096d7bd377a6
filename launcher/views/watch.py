"""`onecurve watch`: a run as it goes, from its directory alone, so that it works across machines that share a disk."""

from __future__ import annotations

import contextlib
import itertools
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onecurve.launcher.cluster.slurm import QueueState, find_job, find_run
from onecurve.launcher.errors import NotARun
from onecurve.launcher.facts.history import (
    MetricsFile,
    count_seconds,
    count_steps,
    is_metric,
    load_history,
)
from onecurve.launcher.units import GIB, format_seconds
from onecurve.training.metric_names import pick_main_metrics

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

_RATE_STEPS = 20
# An evaluation or a save may take minutes; a training that is silent for longer has likely been killed.
_STALE_SECONDS = 600.0
_STALE_STEPS = 50
# A queue serves many; it is not to be asked at each look.
_SECONDS_BETWEEN_QUESTIONS = 30.0
# From the end of the processes that failed to the first word of those that the launcher starts instead.
_SECONDS_TO_RESTART = 180.0
_BLOCKS = "▁▂▃▄▅▆▇█"


# Tells what the queue says of a run's job; None where it has none.
Queue = Callable[[Path], QueueState | None]


@dataclass(frozen=True)
class View:
    """What is known of a run at one moment.

    Attributes:
        state: running, finished, preempted, failed or unknown.
        num_steps: of the whole training; None where the run directory does not tell.
        seconds_left: at the present rate; None where it can't be told.
        seconds_silent: since the last line was written, while the state is running.
        is_stale: so long that the training is likely gone without having said so.
        peak_memory_bytes: the most that a process has held; None where the training did not write it.
        num_restarts: starts after the first; None where they were not counted.
        restarts_left: how often the launcher will start what has just failed again; 0 if it should have done so by now.
        queue_state: of the run's job, in the queue's words.
        is_over: it has ended, and nothing is known that would start it again.
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


def find_run_directory(target: str) -> Path:
    """The run directory that a person names, by its path or by the number of the Slurm job that trains in it.

    Raises:
        NotARun: it is neither.
    """
    folder = Path(target) if Path(target).exists() else find_run(target)
    if folder is None:
        raise NotARun(f"{target!r} is neither a run directory nor the number of a job that `onecurve submit` has sent")
    return folder


def wait_for_start(console: Console, run: Path, every_seconds: float) -> bool:
    """While its job waits in the queue, a run directory is empty: say so, and wait for the training to begin.

    Args:
        every_seconds: between looks; 0 looks once.

    Returns:
        whether it has begun, or there is no job to wait for.
    """
    told, due = None, -math.inf
    while not (run / "config.yaml").is_file():
        if time.monotonic() >= due:
            due = time.monotonic() + _SECONDS_BETWEEN_QUESTIONS
            job = find_job(run)
            if job is None:
                return True
            if job.state != told:
                console.print(job.describe(), highlight=False, markup=False)
                told = job.state
            if job.is_over or not every_seconds:
                return False
        time.sleep(every_seconds)
    return True


class PatientQueue:
    """A queue that is asked now and then, in a thread, so that neither a drawing nor Ctrl-C waits for its answer."""

    def __init__(self, queue: Queue, seconds_between: float = _SECONDS_BETWEEN_QUESTIONS) -> None:
        self._queue = queue
        self._seconds_between = seconds_between
        self._due = -math.inf
        self._thread: threading.Thread | None = None
        self._answer: QueueState | None = None

    @property
    def is_asking(self) -> bool:
        """Whether an answer is on its way."""
        return self._thread is not None and self._thread.is_alive()

    def __call__(self, run: Path) -> QueueState | None:
        """The last answer; that to a new question if it comes at once."""
        if not self.is_asking and time.monotonic() >= self._due:
            self._due = time.monotonic() + self._seconds_between
            self._thread = threading.Thread(target=self._ask, args=(run,), daemon=True)
            self._thread.start()
            self._thread.join(timeout=0.3)
        return self._answer

    def _ask(self, run: Path) -> None:
        self._answer = self._queue(run)


def build_view(
    run: Path, queue: Queue | None = None, now: float | None = None, metrics: MetricsFile | None = None
) -> View:
    """Read the run directory once.

    Args:
        now: seconds since 1970; the clock's, if not given.
        metrics: the run's, by one who looks again and again.

    Raises:
        NotARun: no training has written there.
    """
    history = load_history(run, metrics)
    last = history.steps[-1] if history.steps else {}
    recent = history.steps[-_RATE_STEPS:]
    seconds = count_seconds(recent)
    num_steps = count_steps(history)
    is_running = history.state == "running"
    step = last.get("step", 0)
    left = silent = None
    if is_running and num_steps is not None and recent:
        left = max(0, num_steps - step) * seconds / len(recent)
    files = [run / name for name in ("metrics.jsonl", "status.json", "environment.json")]
    written = max((path.stat().st_mtime for path in files if path.exists()), default=0.0)
    since = max(0.0, (time.time() if now is None else now) - written)
    if is_running:
        silent = since
    restarts_left = int(history.status.get("restarts_left", 0)) if since < _SECONDS_TO_RESTART else 0
    job = queue(run) if queue is not None else None
    # Bad input and a divergence would only repeat, and are not tried again.
    can_go_on = history.state != "finished" and history.status.get("exit_code") not in (2, 3)
    will_go_on = can_go_on and ((job is not None and not job.is_over) or restarts_left > 0)
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

    lines = [*_describe_progress(view), *_describe_surroundings(view)]
    if view.message:
        lines.append(view.message)
    curve = draw_curve(view.losses, width)
    text = Text("\n".join([*lines, "", *curve]) if curve else "\n".join(lines))
    colors = {"running": "green", "finished": "blue", "preempted": "yellow", "failed": "red", "stale": "yellow"}
    state = "stale" if view.is_stale else view.state
    room = max(20, width - len(state))
    title = Text(f"{state}  {view.run if len(view.run) <= room else '…' + view.run[-room:]}")
    return Panel(text, title=title, border_style=colors.get(state, "white"), expand=False)


def _describe_progress(view: View) -> list[str]:
    first = f"step {view.step:,}" + (f" of {view.num_steps:,}" if view.num_steps else "") + f"   epoch {view.epoch:.2f}"
    if view.seconds_left is not None and not view.is_stale:
        first += f"   {format_seconds(view.seconds_left)} left"
    lines = [first]
    if view.loss is not None:
        lines.append(
            f"loss {view.loss:.4f}   lr {view.learning_rate or 0:.2e}   gradient norm {view.grad_norm or 0:.3f}"
        )
        lines.append(f"{view.tokens_per_second or 0:,.0f} tokens/s   padding {view.padding or 0:.1%}")
        if view.peak_memory_bytes is not None:
            lines[-1] += f"   peak memory {view.peak_memory_bytes / GIB:.2f} GiB"
    if view.last_evaluation:
        names = [name for name, value in view.last_evaluation.items() if is_metric(name, value)]
        lines.append(
            f"evaluation after step {view.last_evaluation['step']}: "
            + "  ".join(
                f"{name.removeprefix('eval_')} {view.last_evaluation[name]:.4f}"
                for name in pick_main_metrics(names, view.main_metrics)[:3]
            )
        )
    return lines


def _describe_surroundings(view: View) -> list[str]:
    lines = []
    if view.num_restarts:
        lines.append(f"started again {'once' if view.num_restarts == 1 else f'{view.num_restarts} times'}")
    if view.restarts_left:
        lines.append(f"starts again from its last checkpoint; {view.restarts_left} more possible")
    if view.queue_state is not None:
        lines.append(view.queue_state)
    if view.is_stale:
        lines.append(
            f"nothing written for {format_seconds(view.seconds_silent or 0)}: likely killed; onecurve resume goes on"
        )
    elif view.seconds_silent is not None and view.seconds_silent > 60:
        lines.append(f"nothing written for {format_seconds(view.seconds_silent)}: it evaluates, saves, or is gone")
    return lines


def follow(console: Console, run: Path, every_seconds: float, queue: Queue = find_job) -> None:
    """Draw again and again until the run has ended for good or the user has seen enough."""
    from rich.live import Live

    patient, metrics = PatientQueue(queue), MetricsFile(run / "metrics.jsonl")
    view = build_view(run, patient, metrics=metrics)
    first = render(view, _width(console))
    with _noticing_ctrl_c() as asked, Live(first, console=console, refresh_per_second=4) as live:
        while not view.is_over or (view.state != "finished" and patient.is_asking):
            until = time.monotonic() + every_seconds
            while not asked and time.monotonic() < until:
                time.sleep(min(0.1, every_seconds))
            if asked:
                return
            view = build_view(run, patient, metrics=metrics)
            live.update(render(view, _width(console)))


@contextlib.contextmanager
def _noticing_ctrl_c() -> Iterator[list[int]]:
    """Collect Ctrl-C instead of raising it anywhere: raised in the middle of a drawing, it was once seen to get lost."""
    asked: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: asked.append(number))
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def _width(console: Console) -> int:
    return max(20, console.width - 16)
