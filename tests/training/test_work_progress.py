"""Progress of work beside the steps: only of what takes long, with the time that is left."""

from __future__ import annotations

import io
import time
from pathlib import Path

import pytest
from rich.console import Console

from onecurve.training import work_progress
from onecurve.training.work_progress import WorkProgress, follow, following_files, measure_folder


class Clock:
    """Seconds that pass when a test says so."""

    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def test_a_line_every_half_minute_says_what_is_left() -> None:
    clock, lines = Clock(), list[str]()
    with WorkProgress("tokenizing train", 1_000_000, "rows", lines.append, clock=clock) as progress:
        for _ in range(10):
            clock.seconds += 20
            progress.advance(100_000)
    assert lines == [
        "tokenizing train: 200,000 of 1,000,000 rows, 2 min 40 s left",
        "tokenizing train: 400,000 of 1,000,000 rows, 2 min 00 s left",
        "tokenizing train: 600,000 of 1,000,000 rows, 1 min 20 s left",
        "tokenizing train: 800,000 of 1,000,000 rows, 40 s left",
    ]


def test_short_work_shows_nothing_and_long_work_a_bar() -> None:
    clock, text = Clock(), io.StringIO()
    console = Console(file=text, width=80, force_terminal=True)
    with WorkProgress("predicting", 100, "rows", console=console, clock=clock) as progress:
        clock.seconds = 2.9
        progress.advance(10)
        assert not text.getvalue()
        clock.seconds = 10
        progress.advance(40)
    assert "predicting" in text.getvalue()
    assert "50 %" in text.getvalue()
    assert "10 s left" in text.getvalue()


def test_items_are_passed_on_as_they_are() -> None:
    assert list(follow("loading weights", [3, 1, 2], "tensors")) == [3, 1, 2]


def test_files_that_grow_are_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work_progress, "_SECONDS_BETWEEN_LOOKS", 0.001)
    monkeypatch.setattr(work_progress, "_SECONDS_BETWEEN_LINES", 0.0)
    lines: list[str] = []
    (tmp_path / "a.safetensors").write_bytes(b"x" * 1024)
    with following_files("saving final/", tmp_path, 4096, lines.append):
        until = time.monotonic() + 30
        while not lines and time.monotonic() < until:
            pass
    assert lines, "a thread looks"
    assert lines[0].startswith("saving final/: ")
    assert measure_folder(tmp_path) == 1024
    assert measure_folder(tmp_path / "renamed") == 0


def test_the_bar_of_transformers_is_ours() -> None:
    """The hook that transformers offers is called where it loads weights."""
    import transformers

    from onecurve.training.record.console import quiet_third_parties

    quiet_third_parties()
    found = transformers.logging.tqdm({"a": 1, "b": 2}.items(), desc="Loading weights")
    assert list(found) == [("a", 1), ("b", 2)]
    assert type(found).__name__ == "generator"
