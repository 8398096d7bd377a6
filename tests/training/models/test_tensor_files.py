"""Tensors, and parts of them, from one file or several."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from onecurve.training.models.tensor_files import TensorFiles, write_index

TENSORS = {
    "matrix": torch.arange(35.0).reshape(5, 7),
    "cube": torch.arange(24).reshape(2, 3, 4),
    "vector": torch.arange(5.0),
    "number": torch.tensor(3.5),
    "nothing": torch.zeros(0, 3),
}


@pytest.fixture(params=[1, 2, 5])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The same tensors in one file, or dealt to several."""
    path = tmp_path / "model.safetensors"
    if request.param == 1:
        save_file(TENSORS, path)
        return path
    file_of = {name: f"model-{number % request.param}.safetensors" for number, name in enumerate(TENSORS)}
    for file in set(file_of.values()):
        save_file({name: TENSORS[name] for name in TENSORS if file_of[name] == file}, tmp_path / file)
    write_index(path, file_of, 7)
    return path


def test_each_tensor_is_read_from_its_file(path: Path) -> None:
    with TensorFiles(path) as file:
        assert file.names() == set(TENSORS)
        for name, tensor in TENSORS.items():
            assert file.shape(name) == tensor.shape
            assert torch.equal(file.read(name), tensor)


@pytest.mark.parametrize("num_processes", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("name", TENSORS)
def test_parts_of_any_number_of_processes_add_up(path: Path, name: str, num_processes: int) -> None:
    whole = TENSORS[name]
    share = -(-whole.numel() // num_processes)
    with TensorFiles(path) as file:
        flat = [file.read_flat(name, rank * share, (rank + 1) * share) for rank in range(num_processes)]
        assert torch.equal(torch.cat(flat), whole.flatten())
        if whole.dim() == 0:
            return
        rows, parts = -(-len(whole) // num_processes), []
        for rank in range(num_processes):
            begin = min(rank * rows, len(whole))
            size = (min(rows, len(whole) - begin), *whole.shape[1:])
            parts.append(file.read_part(name, (begin, *[0] * (whole.dim() - 1)), size))
        assert torch.equal(torch.cat(parts), whole)


def test_a_part_of_a_later_dimension_is_read(path: Path) -> None:
    with TensorFiles(path) as file:
        assert torch.equal(file.read_part("cube", (0, 1, 2), (2, 2, 1)), TENSORS["cube"][:, 1:3, 2:3])
