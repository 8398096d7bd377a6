"""Pieces of a part are written one at a time; one that fails does not stop the others from being gathered."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from onecurve.training.parallel.states import States
from onecurve.training.recovery import parts
from onecurve.training.recovery.dealing import Dealing
from onecurve.training.recovery.piece_writer import PieceWriter
from onecurve.training.recovery.state_copy import StateCopy

FILE = "model.safetensors"


def test_no_more_than_two_are_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_write = threading.Event()
    started: list[str] = []

    def hold(tensors: Any, path: Path, *more: Any) -> None:
        started.append(path.name)
        assert may_write.wait(10)
        save_file(tensors, path, *more)

    monkeypatch.setattr(parts, "save_file", hold)
    pieces = PieceWriter(tmp_path)
    pieces.write("a", {"x": torch.ones(3)})
    filled = threading.Thread(target=pieces.write, args=("b", {"y": torch.zeros(2)}))
    filled.start()
    filled.join(0.2)
    assert filled.is_alive(), "the first is not written yet"
    assert started == ["a"]
    may_write.set()
    filled.join()
    assert pieces.finish() == ["a", "b"]
    assert load_file(tmp_path / "a")["x"].tolist() == [1, 1, 1]
    assert load_file(tmp_path / "b")["y"].tolist() == [0, 0]


def test_the_first_failure_is_told_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(tensors: Any, path: Path, *more: Any) -> None:
        raise OSError(28, f"no space for {path.name}")

    monkeypatch.setattr(parts, "save_file", fail)
    pieces = PieceWriter(tmp_path)
    for file in ("a", "b", "c"):
        pieces.write(file, {"x": torch.ones(1)})
    with pytest.raises(OSError, match="no space for a"):
        pieces.finish()


def test_a_state_is_in_pieces_but_for_the_last_one(tmp_path: Path) -> None:
    """Of the tensors of one process, 8 bytes each, three to a piece."""
    expected = {f"w{number}": torch.tensor([number, number + 0.5]) for number in range(8)}

    def states() -> States:
        yield from expected.items()

    copy, pieces = StateCopy(rank=1), PieceWriter(tmp_path)
    copy.dealing = Dealing((1, 2), piece_bytes=24)
    copy.take("optimizer.safetensors", iter([("other", torch.zeros(100))]), pieces)
    copy.take(FILE, states(), pieces)
    assert pieces.finish() == []
    assert copy.dealing.owners[FILE]["w0"] == 2, "it has less so far"
    copy = StateCopy(rank=2)
    copy.dealing = Dealing((1, 2), piece_bytes=24)
    pieces = PieceWriter(tmp_path)
    copy.take("optimizer.safetensors", iter([("other", torch.zeros(100))]), pieces)
    copy.take(FILE, states(), pieces)
    names = ["model-00002-of-00002.safetensors", "model-00002-of-00002-2.safetensors"]
    assert pieces.finish() == names
    found = {name: tensor for file in names for name, tensor in load_file(tmp_path / file).items()}
    last = copy.group_by_file()
    assert set(last) == {"model-00002-of-00002-3.safetensors"}
    found |= last["model-00002-of-00002-3.safetensors"]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
