"""A process of a training chooses how torch gets a GPU's memory before torch is there, whoever launched it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:128"}, "max_split_size_mb:128"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:128"}, "None"),
    ],
)
def test_segments_may_grow_unless_the_user_says_otherwise(given: dict[str, str], expected: str) -> None:
    code = (
        "import os, sys, onecurve.training.process; assert 'torch' not in sys.modules; "
        "print(os.environ.get('PYTORCH_ALLOC_CONF'))"
    )
    environment = {name: value for name, value in os.environ.items() if name not in NAMES} | given
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == expected
