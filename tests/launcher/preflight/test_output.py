"""Room for checkpoints: as many as the training counts, less what is there."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from onecurve.launcher.facts.shape import load_shape
from onecurve.launcher.planning.memory import count_checkpoint_bytes, count_final_bytes
from onecurve.launcher.preflight.output import check_disk
from onecurve.training.config import Recipe, build_recipe
from onecurve.training.recovery.milestones import Milestones
from tests.messages import names

_Usage = namedtuple("_Usage", "total used free")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"checkpointing_steps": 5, "max_train_steps": 40},
        {"checkpointing_steps": "epoch", "max_train_steps": None, "num_train_epochs": 3},
        {"checkpointing_steps": 5, "save_total_limit": 2},
        {"metric_for_best_model": "accuracy", "eval_steps": 4, "max_train_steps": None},
        {"metric_for_best_model": "accuracy", "eval_steps": 4, "save_total_limit": 3},
    ],
)
def test_room_is_counted_as_the_training_does(
    settings: dict[str, Any], recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = build_recipe({**recipe, **settings})
    shape = load_shape(whole.model_name_or_path)
    steps_per_epoch = -(-203 // whole.train_batch_size)
    num_steps = whole.max_train_steps or int(whole.num_train_epochs * steps_per_epoch)
    most = Milestones(whole, steps_per_epoch, num_steps).most_checkpoints()
    needed = most * count_checkpoint_bytes(shape) + count_final_bytes(shape)
    for free, expected in ((needed, 0), (needed - 1, 1)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: _Usage(free, 0, free))
        assert len([finding for finding in check_disk(whole, shape) if finding.severity == "error"]) == expected


def test_checkpoints_that_are_there_need_no_more_room(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Recipe(**{**recipe, "output_dir": str(tmp_path / "run")})
    shape = load_shape(whole.model_name_or_path)
    free = count_final_bytes(shape)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: _Usage(free, 0, free))
    assert names(check_disk(whole, shape)[0].message, "1 checkpoints", "final/")
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "optimizer.safetensors").write_bytes(b"x" * count_checkpoint_bytes(shape))
    assert check_disk(whole, shape) == []
