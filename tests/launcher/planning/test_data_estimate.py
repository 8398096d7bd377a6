"""Examples and their lengths before anything is prepared: what `plan` and `check` know of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from onecurve.launcher.planning.data_estimate import estimate_data
from onecurve.training.config import load_recipe
from tests.launcher.conftest import machine, messages
from tests.messages import names
from tools.images import CLASSES, build_vit, write_image


@pytest.fixture
def images(tmp_path: Path) -> dict[str, Any]:
    """Twenty images in folders, and a model of 16 patches."""
    for number in range(20):
        write_image(tmp_path / "train" / CLASSES[number % 3] / f"{number}.png", number)
    return {
        "task": "image_classification",
        "model_name_or_path": str(build_vit(tmp_path / "vit")),
        "train_file": str(tmp_path / "train"),
        "output_dir": str(tmp_path / "run"),
    }


def test_an_image_has_as_many_tokens_as_the_model_makes_patches(images: dict[str, Any]) -> None:
    flags = {name: str(value) for name, value in images.items()}
    found = estimate_data(load_recipe(None, flags).recipe)
    assert (found.num_examples, found.mean_length, found.longest, found.padding) == (18, 16, 16, 0)


def test_check_looks_for_the_image_processor_and_at_the_images(images: dict[str, Any], tmp_path: Path) -> None:
    assert messages(images, machine()) == []
    (tmp_path / "vit" / "preprocessor_config.json").unlink()
    (tmp_path / "train" / "dark" / "3.png").write_bytes(b"no image")
    found = "\n".join(messages(images, machine()))
    assert names(found, "image processor", "preprocessor_config.json")
    assert names(found, "row", "3.png")
