"""transformers.Trainer multiplies a sequence classifier's gradient by accumulation x processes; Onecurve does not.

Where a newer transformers turns these red, the fault is mended: say so in docs/REFERENCES.md and the README.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks import references_trainer
from benchmarks.references import FAULT_HEADINGS, FAULT_RECIPE, reproduce_fault, to_fault_rows
from benchmarks.references_lesson import Learned, largest_deviation
from tests.reference.conftest import BuildLesson, TrainOnecurve
from tools.launches import LaunchServer


@pytest.mark.slow
def test_accumulating_four_times_multiplies_only_trainers_gradient(
    lesson: BuildLesson, tiny_settings: dict[str, Any], tiny_onecurve: Learned, train_onecurve: TrainOnecurve
) -> None:
    settings = {
        **tiny_settings,
        "per_device_batch_size": 4,
        "max_train_steps": 2,
        "num_warmup_steps": 6,
        "warmup_ratio": 0,
    }
    trainer, onecurve = references_trainer.train(lesson(settings)), train_onecurve(settings)
    assert trainer.grad_norms[0] / tiny_onecurve.grad_norms[0] == pytest.approx(4, rel=1e-4)
    assert trainer.losses[0] / tiny_onecurve.losses[0] == pytest.approx(4, rel=1e-4)
    assert largest_deviation(onecurve.grad_norms, tiny_onecurve.grad_norms[:2]) < 1e-4
    assert largest_deviation(onecurve.losses, tiny_onecurve.losses[:2]) < 1e-5


@pytest.mark.slow
def test_four_topologies(tmp_path: Path, tiny_model: Path, news: Path, launch_server: LaunchServer) -> None:
    data = ["--train_file", str(news / "train.jsonl"), "--validation_file", str(news / "validation.jsonl")]
    flags = [*FAULT_RECIPE, *data, "--max_length", "32", "--model_name_or_path", str(tiny_model)]
    found = reproduce_fault(flags, tmp_path, Console(quiet=True), launch_server.launch)
    reference = found[1, 1]["Onecurve"]
    for (num_processes, accumulation), ways in found.items():
        factor = ways["Trainer"].grad_norms[0] / reference.grad_norms[0]
        assert factor == pytest.approx(num_processes * accumulation, rel=1e-4)
        assert largest_deviation(ways["Onecurve"].grad_norms, reference.grad_norms) < 1e-4
        assert largest_deviation(ways["Onecurve"].losses, reference.losses) < 1e-5
    assert all(len(row) == len(FAULT_HEADINGS) for row in to_fault_rows(found))
