"""Lessons on a tiny model, and Onecurve's own curve on them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from accelerate.state import AcceleratorState

from benchmarks.references_lesson import Learned, Lesson, build_lesson
from onecurve.training.config import load_recipe, parse_arguments
from tests.conftest import DEMO, Launch, to_flags

Settings = Mapping[str, Any]
BuildLesson = Callable[[Settings], Lesson]
TrainOnecurve = Callable[[Settings], Learned]


@pytest.fixture(scope="session")
def tiny_settings(tiny_model: Path, news: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """52 steps over 203 texts of very different length: four epochs, the last batch of each uneven."""
    return {
        "model_name_or_path": str(tiny_model),
        "train_file": str(news / "train.jsonl"),
        "validation_file": str(news / "validation.jsonl"),
        "output_dir": str(tmp_path_factory.mktemp("reference")),
        "max_length": 64,
        "dropout": 0.0,
        "train_batch_size": 16,
        "per_device_batch_size": 16,
        "num_train_epochs": 4,
        "learning_rate": 1e-3,
        "warmup_ratio": 0.1,
        "weight_decay": 0.01,
        "max_grad_norm": 0.3,
    }


@pytest.fixture(scope="session")
def demo_settings(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The demo's model and data, with the beginnings of its texts."""
    return {
        "config": "training/recipes/demo.yaml",
        "train_file": str(DEMO / "train.jsonl"),
        "output_dir": str(tmp_path_factory.mktemp("reference_demo")),
        "max_length": 48,
        "dropout": 0.0,
        "max_train_steps": 20,
        "max_eval_samples": 100,
    }


@pytest.fixture
def lesson() -> Iterator[BuildLesson]:
    """Build what a way is given; afterwards Trainer's global state is gone again.

    One thread, as Onecurve has in the tests: two that share a busy machine wait for each other.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with patch.dict(os.environ):
        yield lambda settings: build_lesson(load_recipe(*parse_arguments(to_flags(settings))).recipe)
        AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="session")
def train_onecurve(launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> TrainOnecurve:
    """Train with Onecurve, one process, as a user starts it."""

    def run(settings: Settings) -> Learned:
        result = launch({**settings, "output_dir": str(tmp_path_factory.mktemp("onecurve"))})
        assert result.exit_code == 0, result.stderr
        return Learned.load_onecurve(result.path)

    return run


@pytest.fixture(scope="session")
def tiny_onecurve(tiny_settings: dict[str, Any], train_onecurve: TrainOnecurve) -> Learned:
    """Onecurve's curve on the tiny model."""
    return train_onecurve(tiny_settings)


@pytest.fixture(scope="session")
def demo_onecurve(demo_settings: dict[str, Any], train_onecurve: TrainOnecurve) -> Learned:
    """Onecurve's curve on the demo."""
    return train_onecurve(demo_settings)
