"""Recipes for models without data, and dropout that is torch's own again after each test."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from onecurve.training.models import example_masks
from onecurve.training.recipe import Recipe


def make_recipe(**settings: Any) -> Recipe:
    return Recipe(model_name_or_path="none", train_file=("none",), **settings)


@pytest.fixture(autouse=True)
def left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Other tests have torch's own dropout."""
    for name in ("dropout", "scaled_dot_product_attention"):
        monkeypatch.setattr(torch.nn.functional, name, getattr(torch.nn.functional, name))
    yield
    example_masks.begin(None)
