"""When to evaluate, to write a checkpoint and to stop early, and which evaluation is the best."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from onecurve.training.config import Recipe
from onecurve.training.metric_names import is_lower_better
from onecurve.training.schedule import count_most_checkpoints


@dataclass
class Progress:
    """How far a training is: all that a resume needs besides weights and moments.

    Attributes:
        step: steps done.
        scheduler: the schedule's own state, plain numbers.
        optimizer_step: updates that AdamW counted; fewer than `step` only if fp16 skipped some.
        best_metric: best value of metric_for_best_model so far.
        best_step: the step of that evaluation.
        num_evaluations_without_better: for early stopping.
        evaluation_is_due: the run stopped before or during the evaluation after this step.
        data: digests of the training and the validation data; empty in a new run.
        loss_scale: the state of fp16's scaler, plain numbers; empty otherwise.
    """

    step: int = 0
    scheduler: dict[str, Any] = field(default_factory=dict)
    optimizer_step: float = 0.0
    best_metric: float | None = None
    best_step: int | None = None
    num_evaluations_without_better: int = 0
    evaluation_is_due: bool = False
    data: dict[str, str] = field(default_factory=dict)
    loss_scale: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for progress.json."""
        return asdict(self)


@dataclass(frozen=True)
class Milestones:
    """What is due after a step; a pure function of the recipe and the step."""

    recipe: Recipe
    steps_per_epoch: int
    num_steps: int

    def evaluates_after(self, step: int) -> bool:
        """Whether an evaluation follows this step; one always follows the last step."""
        return step == self.num_steps or self._is_due(self.recipe.eval_steps, step)

    def saves_after(self, step: int) -> bool:
        """Whether a checkpoint follows this step."""
        return self._is_due(self.recipe.checkpointing_steps, step)

    def most_checkpoints(self) -> int:
        """The most checkpoints that exist at once."""
        return count_most_checkpoints(self.recipe, self.steps_per_epoch, self.num_steps)

    def _is_due(self, every: int | str | None, step: int) -> bool:
        if every is None:
            return False
        return step % (self.steps_per_epoch if every == "epoch" else int(every)) == 0

    def record(self, progress: Progress, metrics: Mapping[str, float]) -> bool:
        """Record an evaluation in `progress`; returns whether it is the best so far."""
        name = self.recipe.metric_for_best_model
        if name is None:
            return False
        name = f"eval_{name.removeprefix('eval_')}"
        if is_better(name, metrics[name], progress.best_metric):
            progress.best_metric, progress.best_step = metrics[name], progress.step
            progress.num_evaluations_without_better = 0
            return True
        progress.num_evaluations_without_better += 1
        return False

    def stops_early(self, progress: Progress) -> bool:
        """Whether early_stopping_patience is exhausted."""
        patience = self.recipe.early_stopping_patience
        return patience is not None and progress.num_evaluations_without_better >= patience


def is_better(name: str, value: float, best: float | None) -> bool:
    """Whether a metric improved: for losses and errors lower is better. Any number is better than none, except NaN."""
    if math.isnan(value):
        return False
    if best is None:
        return True
    return value < best if is_lower_better(name) else value > best
