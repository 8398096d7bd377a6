"""The same weights and the same examples in each step give the same curve in the tutorial's three ways.

Curves are float32: rounding grows over the steps, so the tests hold for some dozens of them.
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import references_keras, references_native, references_trainer
from benchmarks.references_lesson import Learned, largest_deviation
from tests.reference.conftest import BuildLesson

NATIVE_WAYS = [references_native.train, references_trainer.train]
NAMES = ["native", "trainer"]


def test_the_lesson_exercises_clipping_warm_up_and_an_uneven_batch(
    lesson: BuildLesson, tiny_settings: dict[str, Any], tiny_onecurve: Learned
) -> None:
    taught = lesson(tiny_settings)
    assert len(taught.batches) == 52
    assert [len(batch) for batch in taught.batches[:13]] == [16] * 12 + [11]
    assert sorted(row for batch in taught.batches[:13] for row in batch) == list(range(203))
    assert taught.batches[:13] != taught.batches[13:26]
    assert taught.num_warmup_steps == 6
    assert min(tiny_onecurve.grad_norms) < tiny_settings["max_grad_norm"] < max(tiny_onecurve.grad_norms)


@pytest.mark.parametrize("train", NATIVE_WAYS, ids=NAMES)
def test_same_curve(train: Any, lesson: BuildLesson, tiny_settings: dict[str, Any], tiny_onecurve: Learned) -> None:
    learned = train(lesson(tiny_settings))
    assert largest_deviation(learned.losses, tiny_onecurve.losses) < 1e-5
    assert largest_deviation(learned.grad_norms, tiny_onecurve.grad_norms) < 1e-4
    assert learned.accuracy == pytest.approx(tiny_onecurve.accuracy)


@pytest.mark.slow
def test_same_curve_in_keras(lesson: BuildLesson, tiny_settings: dict[str, Any], tiny_onecurve: Learned) -> None:
    learned = references_keras.train(lesson(tiny_settings))
    assert largest_deviation(learned.losses, tiny_onecurve.losses) < 1e-5
    assert learned.accuracy == pytest.approx(tiny_onecurve.accuracy, abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("train", NATIVE_WAYS, ids=NAMES)
def test_same_curve_on_the_demo(
    train: Any, lesson: BuildLesson, demo_settings: dict[str, Any], demo_onecurve: Learned
) -> None:
    learned = train(lesson(demo_settings))
    assert largest_deviation(learned.losses, demo_onecurve.losses) < 1e-5
    assert largest_deviation(learned.grad_norms, demo_onecurve.grad_norms) < 1e-4
    assert learned.accuracy == pytest.approx(demo_onecurve.accuracy, abs=0.01)


@pytest.mark.slow
def test_same_curve_in_keras_on_the_demo(
    lesson: BuildLesson, demo_settings: dict[str, Any], demo_onecurve: Learned
) -> None:
    learned = references_keras.train(lesson(demo_settings))
    assert largest_deviation(learned.losses, demo_onecurve.losses) < 1e-4
    assert learned.accuracy == pytest.approx(demo_onecurve.accuracy, abs=0.01)
