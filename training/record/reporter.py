"""What a person and a program see: a progress bar, metrics.jsonl, trackers, and a table at the end.

Rank 0 writes; the other ranks keep the same queue, so that a loss that is not finite stops all of them at one step.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from accelerate import Accelerator
from rich import progress as rich_progress
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from onecurve.training.atomic_files import write_atomically
from onecurve.training.data.plan import MicroBatch, TrainingPlan
from onecurve.training.errors import Diverged
from onecurve.training.record.console import describe_metrics
from onecurve.training.record.late_values import LateValues
from onecurve.training.record.peak_memory import measure_peak_memory
from onecurve.training.recovery.milestones import Progress
from onecurve.training.run_directory import RunDirectory

# Values of a step are read when this many later ones are queued, so the device always has work.
STEPS_LATE = 2

# fp16 halves its loss scale, which begins at 2**16, with each step that it skips. This many halvings help no gradient.
_MAX_STEPS_SKIPPED = 24

_PLAIN_LINES_PER_RUN = 20
_MAX_EXAMPLES_SHOWN = 64


@dataclass(frozen=True)
class _Step:
    micro_batch: MicroBatch
    values: LateValues
    learning_rate: float
    seconds: float


class Reporter:
    """Writes the lines of one run, a few steps late, and shows its progress.

    Args:
        run: where the lines go.
        accelerator: its trackers get every line too.
        plan: the steps of the whole training, and the examples of each.
        progress: where this start begins.
        main_metrics: those of an evaluation that are printed, without prefix.
    """

    def __init__(
        self,
        run: RunDirectory,
        accelerator: Accelerator,
        plan: TrainingPlan,
        progress: Progress,
        main_metrics: Sequence[str],
    ) -> None:
        self._is_main = accelerator.is_main_process
        self.console = Console(quiet=not self._is_main)
        self._run = run
        self._main_metrics = main_metrics
        self._plan = plan
        self._num_steps = plan.stop_step
        self._progress = progress
        self.stop_is_agreed = False
        self.save_has_failed = False
        self._accelerator = accelerator
        self._pending: deque[_Step] = deque()
        self._file: IO[str] | None = None
        self._last_time = time.perf_counter()
        self.last_loss = math.nan
        self._num_skipped = 0
        self._bar = rich_progress.Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("epoch {task.fields[epoch]:.2f}  loss {task.fields[loss]:.4f}  lr {task.fields[rate]:.2e}"),
            TextColumn("{task.fields[speed]:,.0f} tokens/s  left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self._is_main or not self.console.is_terminal,
        )
        self._bar_task = self._bar.add_task(
            "train", total=plan.stop_step, completed=progress.step, epoch=0.0, loss=math.nan, rate=0.0, speed=0.0
        )

    def __enter__(self) -> Reporter:
        if self._is_main:
            self._run.path.mkdir(parents=True, exist_ok=True)
            self.say(cut_back(self._run.metrics, self._progress))
            self._file = self._run.metrics.open("a", encoding="utf-8")
        self._bar.start()
        self._last_time = time.perf_counter()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()
        if self._file is not None:
            with contextlib.suppress(OSError):  # The error has been reported by then.
                self._file.close()

    def log_step(
        self, micro_batch: MicroBatch, sums: torch.Tensor, grad_norm: torch.Tensor, learning_rate: float
    ) -> None:
        """Queue a step's line and write those that are old enough.

        Args:
            sums: [3] the same on all processes: mean loss of the whole global batch, how many processes were asked to
                stop, and how many know of a checkpoint that could not be written.
            grad_norm: global norm before clipping.

        Raises:
            Diverged: a loss or norm that is due is not finite.
        """
        now = time.perf_counter()
        values = LateValues(torch.cat([sums, grad_norm.reshape(1)]))
        self._pending.append(_Step(micro_batch, values, learning_rate, now - self._last_time))
        self._last_time = now
        while len(self._pending) > STEPS_LATE:
            self._write_step(self._pending.popleft())

    def flush(self) -> None:
        """Write every line that is queued to the disk.

        Raises:
            Diverged: as `log_step`.
        """
        while self._pending:
            self._write_step(self._pending.popleft())
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())  # A checkpoint that follows must not outlive the lines before it.

    def restart_clock(self) -> None:
        """Leave out of the next step's rate the time that an evaluation or a save took."""
        self._last_time = time.perf_counter()

    def _write_step(self, step: _Step) -> None:
        number = step.micro_batch.step + 1
        loss, num_asked_to_stop, num_failed_saves, grad_norm = step.values.read()
        self.stop_is_agreed = self.stop_is_agreed or num_asked_to_stop > 0
        self.save_has_failed = self.save_has_failed or num_failed_saves > 0
        values = {
            "epoch": round(number / self._plan.order.steps_per_epoch, 4),
            "loss": loss,
            "learning_rate": step.learning_rate,
            "grad_norm": grad_norm,
            "examples": step.micro_batch.num_examples,
            "tokens": step.micro_batch.num_tokens,
            "tokens_per_second": round(step.micro_batch.num_tokens / max(step.seconds, 1e-9), 1),
            "padding": round(1 - step.micro_batch.num_tokens / step.micro_batch.num_padded_tokens, 4),
            "peak_memory_bytes": measure_peak_memory(),
        }
        self._check_finite(step, {name: values[name] for name in ("loss", "grad_norm")})
        self.last_loss = values["loss"]
        digest = {"examples_digest": step.micro_batch.examples_digest}  # Trackers draw numbers.
        self._write({"event": "train", "step": number, **values, **digest})
        self._accelerator.log(values, step=number)
        self._bar.update(
            self._bar_task,
            completed=number,
            epoch=values["epoch"],
            loss=values["loss"],
            rate=values["learning_rate"],
            speed=values["tokens_per_second"],
        )
        if self._bar.disable and (number % max(1, self._num_steps // _PLAIN_LINES_PER_RUN) == 0 or number == 1):
            self.say(
                f"step {number}/{self._num_steps}  epoch {values['epoch']:.2f}  loss {values['loss']:.4f}  "
                f"lr {values['learning_rate']:.2e}  {values['tokens_per_second']:,.0f} tokens/s"
            )

    def _check_finite(self, step: _Step, values: Mapping[str, float]) -> None:
        number = step.micro_batch.step + 1
        if self._accelerator.mixed_precision == "fp16":
            # fp16 skips an update whose gradients overflow: their norm is infinite, and nothing is wrong.
            self._num_skipped = 0 if math.isfinite(values["grad_norm"]) else self._num_skipped + 1
            if self._num_skipped > _MAX_STEPS_SKIPPED:
                raise Diverged(
                    f"the gradients of {self._num_skipped} steps in succession overflowed in fp16, the last at step {number}: "
                    "training diverged. Lower learning_rate, or use mixed_precision bf16 or no"
                )
            values = {"loss": values["loss"]}
        for name, value in values.items():
            if not math.isfinite(value):
                raise Diverged(
                    f"{name} is {value} at step {number}: training diverged. Lower learning_rate, raise "
                    f"num_warmup_steps, or look at this step's examples (from 0, of the training data): "
                    f"{_list_some(self._plan.order.global_batch(step.micro_batch.step).tolist())}"
                )

    def log_evaluation(self, step: int, metrics: Mapping[str, float], event: str = "eval") -> None:
        """Write an evaluation's line, after those of all steps before it.

        Args:
            event: "eval", or "test" for the test data.

        Raises:
            Diverged: its loss is not finite, or as `log_step`.
        """
        self.flush()
        loss = metrics[f"{event}_loss"]
        if not math.isfinite(loss):
            raise Diverged(
                f"{event}_loss is {loss} after step {step}: training diverged. Lower learning_rate or raise num_warmup_steps"
            )
        self._write({"event": event, "step": step, **metrics})
        self._accelerator.log(dict(metrics), step=step)
        self.say(f"evaluation after step {step}: {describe_metrics(metrics, self._main_metrics)}")
        self.restart_clock()

    def say(self, message: str | None) -> None:
        """Print lines above the progress bar, on the main process; None is nothing to say."""
        if message is not None:
            self.console.print(message, highlight=False, markup=False, soft_wrap=True)

    def _write(self, line: Mapping[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(line) + "\n")


def _list_some(numbers: list[int]) -> str:
    shown = ", ".join(map(str, sorted(numbers)[:_MAX_EXAMPLES_SHOWN]))
    return shown if len(numbers) <= _MAX_EXAMPLES_SHOWN else f"{shown} and {len(numbers) - _MAX_EXAMPLES_SHOWN} more"


def cut_back(metrics: Path, progress: Progress) -> str | None:
    """Drop, atomically, the lines that a run resumed at `progress` writes again, and a half-written last line.

    Returns:
        What to say of lines that are missing; None where none is.
    """
    if not metrics.exists():
        return None
    kept, steps = [], []
    for text in metrics.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if line["step"] > progress.step or not progress.step or line["event"] == "test":
            continue
        if line["event"] == "eval" and line["step"] == progress.step and progress.evaluation_is_due:
            continue
        kept.append(text)
        if line["event"] == "train":
            steps.append(line["step"])
    write_atomically(metrics, "".join(f"{text}\n" for text in kept))
    # A run that began at another's checkpoint has no lines of the steps before.
    num_missing = progress.step + 1 - steps[0] - len(steps) if steps else 0
    if not num_missing:
        return None
    return f"{metrics} lacks the lines of {num_missing} steps before step {progress.step + 1}; the training misses nothing."
