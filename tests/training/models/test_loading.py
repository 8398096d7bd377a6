"""Where tokenizer and model come from."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants

from onecurve.training.config import Recipe
from onecurve.training.models.loading import load_config
from onecurve.training.tasks.processors import TOKENIZER


def test_the_revision_is_the_models_not_that_of_another_tokenizer(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for name, revision in (("one", "v2"), ("words", "main")):
        folder = tmp_path / f"models--team--{name}"
        shutil.copytree(tiny_model, folder / "snapshots" / "c1")
        (folder / "refs").mkdir()
        (folder / "refs" / revision).write_text("c1", encoding="utf-8")
    recipe = {"model_name_or_path": "team/one", "model_revision": "v2", "train_file": "x.csv", "max_length": 16}
    for tokenizer_name in (None, "team/one", "team/words"):
        settings = Recipe.model_validate({**recipe, "tokenizer_name": tokenizer_name})
        assert len(TOKENIZER.load(settings, load_config(settings)))
