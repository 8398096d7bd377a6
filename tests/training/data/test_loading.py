"""From a planned micro-batch to tensors: a task draws what an epoch changes of its examples."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onecurve.training.config import load_recipe
from onecurve.training.data import loading
from onecurve.training.data.columns import Array, ExamplesWriter, open_examples
from onecurve.training.data.layout import Layout
from onecurve.training.data.loading import PlannedExamples
from onecurve.training.data.plan import EvaluationPlan, Order, TrainingPlan
from onecurve.training.data.preparation import Split
from onecurve.training.process import count_local_cores
from onecurve.training.tasks import build_task
from onecurve.training.tasks.base import EVALUATION_EPOCH, build_generator
from tests.training.data.test_layout import Tokenizer
from tests.training.models.next_token import NextToken


class Stamped(NextToken):
    """Writes into each example its number, the epoch and the length of what no batch carries."""

    unbatched_features = frozenset({"words"})

    def draw(self, features: Mapping[str, Any], numbers: Array, epoch: int) -> Mapping[str, Any]:
        lengths = [len(words) for words in features["words"]]
        stamps = [[number, epoch, length] for number, length in zip(numbers, lengths, strict=True)]
        return {**features, "drawn": np.array(stamps)}


@pytest.fixture
def split(tmp_path: Path) -> Split:
    with ExamplesWriter(tmp_path / "examples") as writer:
        writer.write({"input_ids": [[number] * 3 for number in range(5)], "words": [[0] * n for n in range(5)]})
    return Split(open_examples(tmp_path / "examples"), np.full(5, 3), np.ones(5), "here", "")


def test_a_task_is_given_numbers_epoch_and_all_features(split: Split) -> None:
    examples = PlannedExamples(split, Stamped.__new__(Stamped), Tokenizer(), Layout())
    plan = TrainingPlan(Order(5, 2, seed=1), stop_step=6, num_processes=1, max_examples=2)
    for micro_batch in plan:
        batch = examples.__getitems__(micro_batch)
        assert batch["drawn"].tolist() == [[n, micro_batch.epoch, n] for n in micro_batch.indices]
        assert batch["input_ids"][:, 0].tolist() == micro_batch.indices.tolist()
        assert "words" not in batch
    assert {micro_batch.epoch for micro_batch in plan} == {0, 1}
    [evaluated] = EvaluationPlan(split.lengths, 1, 8)
    assert examples.__getitems__(evaluated)["drawn"][:, 1].tolist() == [EVALUATION_EPOCH] * 5


def test_each_seed_epoch_and_example_has_numbers_of_its_own() -> None:
    keys = [(seed, epoch, number) for seed in (0, 2**63 - 1) for epoch in (-1, 0, 1) for number in (0, 1, 2**40)]
    drawn = [build_generator(*key).random(64) for key in keys]
    assert len({value for values in drawn for value in values}) == 64 * len(keys)
    assert (build_generator(3, 1, 4).random(64) == build_generator(3, 1, 4).random(64)).all()


@pytest.mark.parametrize(
    ("asked", "task", "device", "expected"),
    [
        ("auto", "text_classification", "cuda", 0),
        ("auto", "image_classification", "cuda", 6),
        ("auto", "image_classification", "cpu", 0),
        ("3", "image_classification", "cuda", 3),
        ("0", "image_classification", "cuda", 0),
        ("3", "text_classification", "cpu", 3),
    ],
)
def test_processes_make_the_batches_that_a_gpu_would_wait_for(
    monkeypatch: pytest.MonkeyPatch, asked: str, task: str, device: str, expected: int
) -> None:
    monkeypatch.setattr(loading, "count_local_cores", lambda: 6)
    flags = {"model_name_or_path": "m", "train_file": "t", "task": task, "dataloader_num_workers": asked}
    recipe = load_recipe(None, flags).recipe
    assert loading.count_workers(recipe, build_task(recipe), device) == expected


def test_cores_are_shared_by_the_processes_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(32)))
    found = []
    for count in ("1", "8", "64"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", count)
        found.append(count_local_cores())
    assert found == [32, 4, 0]
