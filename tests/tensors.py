"""What is in a folder of weights or moments, in however many files."""

from __future__ import annotations

from pathlib import Path

import torch

from onecurve.training.models.tensor_files import TensorFiles


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of `path`, or of its parts."""
    with TensorFiles(path) as file:
        return {name: file.read(name) for name in file.names()}
