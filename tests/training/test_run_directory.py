"""The run directory: the names of its files, and its status."""

from __future__ import annotations

from pathlib import Path

import pytest

from onecurve.training.run_directory import RunDirectory
from tests.training.conftest import resolve


def test_every_path_lies_in_the_output_dir(tmp_path: Path) -> None:
    run = RunDirectory.of(resolve(tmp_path / "run").recipe)
    names = [name for name, value in vars(RunDirectory).items() if isinstance(value, property)]
    paths = [getattr(run, name) for name in names]
    assert {path.parent for path in paths} == {tmp_path / "run"}
    assert len(set(paths)) == len(paths)
    assert not (tmp_path / "run").exists(), "asking for a path makes nothing"


@pytest.mark.parametrize("content", [None, "", "{", "[1]", "7", "null"])
def test_a_status_that_says_nothing_is_none(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "status.json").write_text(content)
    assert RunDirectory(tmp_path).read_status() is None


def test_a_status_is_read_back(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text('{"state": "finished", "step": 3}')
    assert RunDirectory(tmp_path).read_status() == {"state": "finished", "step": 3}
