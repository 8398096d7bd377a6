"""What is due after a step, which evaluation was the best, and when patience ends."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onecurve.training.config import Recipe
from onecurve.training.recovery.milestones import Milestones, Progress, is_better


def build(num_steps: int = 25, **settings: Any) -> Milestones:
    """Milestones of epochs of ten steps."""
    return Milestones(Recipe(model_name_or_path="m", train_file=("t",), **settings), 10, num_steps)


def evaluated(milestones: Milestones) -> list[int]:
    return [step for step in range(1, milestones.num_steps + 1) if milestones.evaluates_after(step)]


def saved(milestones: Milestones) -> list[int]:
    return [step for step in range(1, milestones.num_steps + 1) if milestones.saves_after(step)]


def test_evaluations_come_with_each_epoch_and_at_the_end() -> None:
    assert evaluated(build()) == [10, 20, 25]
    assert evaluated(build(num_steps=20)) == [10, 20]


def test_evaluations_come_every_so_many_steps_and_at_the_end() -> None:
    assert evaluated(build(eval_steps=7)) == [7, 14, 21, 25]
    assert evaluated(build(eval_steps=100)) == [25]


def test_checkpoints_come_only_where_the_recipe_asks() -> None:
    assert saved(build()) == []
    assert saved(build(checkpointing_steps="epoch")) == [10, 20]
    assert saved(build(checkpointing_steps=6)) == [6, 12, 18, 24]


@pytest.mark.parametrize(
    ("name", "falls"),
    [
        ("eval_loss", True), ("eval_mse", True), ("eval_mae", True),
        ("eval_accuracy", False), ("eval_f1_macro", False), ("eval_pearson", False), ("eval_matthews_correlation", False),
    ],
)  # fmt: skip
def test_losses_and_errors_get_better_by_falling(name: str, falls: bool) -> None:
    assert is_better(name, 0.1, 0.2) is falls
    assert is_better(name, 0.2, 0.1) is not falls
    assert is_better(name, 0.5, None)
    assert not is_better(name, math.nan, None)
    assert not is_better(name, math.nan, 0.5)
    assert not is_better(name, 0.5, 0.5), "an equal value is not better: the earlier one stays"


@pytest.mark.parametrize("name", ["accuracy", "eval_accuracy"])
def test_the_best_evaluation_is_remembered(name: str) -> None:
    milestones = build(metric_for_best_model=name)
    progress = Progress()
    best = []
    for progress.step, accuracy in enumerate([0.5, 0.4, 0.7, 0.7, 0.6], start=1):
        best.append(milestones.record(progress, {"eval_accuracy": accuracy, "eval_loss": 1.0}))
    assert best == [True, False, True, False, False]
    assert (progress.best_metric, progress.best_step, progress.num_evaluations_without_better) == (0.7, 3, 2)


def test_without_a_metric_nothing_is_the_best() -> None:
    progress = Progress(step=3)
    assert not build().record(progress, {"eval_loss": 0.1})
    assert progress == Progress(step=3)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.integers(1, 5))
def test_patience_counts_evaluations_since_the_best(losses: list[float], patience: int) -> None:
    milestones = build(metric_for_best_model="loss", early_stopping_patience=patience)
    progress = Progress()
    for number, loss in enumerate(losses):
        milestones.record(progress, {"eval_loss": loss})
        since_best = number - losses.index(min(losses[: number + 1]))
        assert milestones.stops_early(progress) == (since_best >= patience)


def test_without_patience_training_goes_on() -> None:
    assert not build(metric_for_best_model="loss").stops_early(Progress(num_evaluations_without_better=1000))


def test_progress_is_plain_numbers() -> None:
    progress = Progress(7, {"last_epoch": 7, "_last_lr": [1e-3, 1e-3]}, 6.0, 0.123456789012345, 4, 1)
    assert Progress(**json.loads(json.dumps(progress.to_dict()))) == progress


@pytest.mark.parametrize(
    ("settings", "most"),
    [
        ({}, 1),  # That of a stop.
        ({"checkpointing_steps": 5}, 5),
        ({"checkpointing_steps": "epoch"}, 2),
        ({"checkpointing_steps": 5, "save_total_limit": 2}, 3),
        ({"checkpointing_steps": 20, "save_total_limit": 4}, 2),
        ({"checkpointing_steps": 5, "save_total_limit": 1, "metric_for_best_model": "accuracy"}, 3),
        ({"metric_for_best_model": "accuracy", "eval_steps": 5}, 5),
        ({"metric_for_best_model": "accuracy", "eval_steps": 10}, 3),
        ({"metric_for_best_model": "accuracy", "eval_steps": 5, "save_total_limit": 4}, 6),
    ],
)
def test_the_most_checkpoints_that_lie_there_at_once_are_known(settings: dict[str, Any], most: int) -> None:
    assert build(**settings).most_checkpoints() == most
