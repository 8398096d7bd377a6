"""A run as it goes."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
from rich.console import Console
from rich.text import Text

from onecurve.launcher.cluster.queue import QueueState
from onecurve.launcher.facts.history import MetricsFile
from onecurve.launcher.views.follow import QueuePoller
from onecurve.launcher.views.progress import build_view
from onecurve.launcher.views.watch import draw_curve, render
from tests.messages import names


def test_a_view_of_a_run_that_goes_on(write_run: Callable[..., Path]) -> None:
    view = build_view(write_run("a", 10, state="running"))
    assert (view.step, view.num_steps) == (10, 40)
    assert view.tokens_per_second == pytest.approx(50)
    assert view.seconds_left == pytest.approx(30 * 2.0)
    assert view.last_evaluation["eval_accuracy"] == 0.8
    assert len(view.losses) == 10


def test_a_view_of_a_run_that_has_just_begun(write_run: Callable[..., Path]) -> None:
    run = write_run("a", state="running", max_train_steps=7)
    (run / "metrics.jsonl").write_text("", encoding="utf-8")
    view = build_view(run)
    assert (view.step, view.num_steps, view.loss, view.seconds_left) == (0, 7, None, None)


@pytest.mark.parametrize("state", ["finished", "preempted", "failed"])
def test_a_view_of_a_run_that_has_ended(state: str, write_run: Callable[..., Path]) -> None:
    run = write_run("a", state=state)
    status = {"state": state, "exit_code": 1, "step": 20, "message": "what was wrong [with] it"}
    (run / "status.json").write_text(json.dumps(status), encoding="utf-8")
    view = build_view(run)
    assert (view.state, view.seconds_left, view.is_stale) == (state, None, False)
    shown = draw(run)
    assert f"{state}  " in shown
    assert "what was wrong [with] it" in shown
    assert "peak memory 1.00 GiB" in shown


def test_a_run_that_is_silent_for_long_is_stale(write_run: Callable[..., Path]) -> None:
    run = write_run("a", 10, state="running")
    assert not build_view(run, now=time.time() + 500).is_stale
    shown = draw(run, now=time.time() + 7300)
    assert "stale  " in shown
    assert names(shown, "2 h 01 min", "onecurve resume")
    assert " left" not in shown


def test_restarts_are_counted(write_run: Callable[..., Path]) -> None:
    run = write_run("a", num_starts=3)
    assert build_view(run).num_restarts == 2
    assert names(draw(run), "2 times")
    assert build_view(write_run("b")).num_restarts is None


def test_the_queue_is_asked(write_run: Callable[..., Path]) -> None:
    run = write_run("a", state="running")
    view = build_view(run, queue=lambda path: queued(path.name))
    assert view.queue_state == "Slurm job 7: a"
    text = io.StringIO()
    Console(file=text, width=80).print(render(view, 80))
    assert "Slurm job 7: a" in text.getvalue()


def queued(state: str) -> QueueState:
    return QueueState("7", state, "None", 0, "", "")


def write_status(run: Path, state: str, exit_code: int | None, **more: int) -> None:
    status = {"state": state, "exit_code": exit_code, "step": 20, "message": "", **more}
    (run / "status.json").write_text(json.dumps(status), encoding="utf-8")


@pytest.mark.parametrize(
    ("state", "exit_code", "job", "is_over"),
    [
        ("running", None, None, False),
        ("preempted", 75, None, True),
        ("preempted", 75, "PENDING", False),
        ("preempted", 75, "TIMEOUT", True),
        ("failed", 1, "COMPLETING", False),
        ("failed", 3, "RUNNING", True),
        ("finished", 0, "RUNNING", True),
    ],
)
def test_a_run_is_not_over_while_its_job_is_not(
    state: str, exit_code: int | None, job: str | None, is_over: bool, write_run: Callable[..., Path]
) -> None:
    run = write_run("a")
    write_status(run, state, exit_code)
    assert build_view(run, queue=lambda path: queued(job) if job else None).is_over == is_over


def test_a_failure_that_is_followed_by_another_start_is_not_the_end(write_run: Callable[..., Path]) -> None:
    run = write_run("a")
    write_status(run, "failed", 1, restarts_left=2)
    assert not build_view(run).is_over
    assert names(draw(run), "2 more")
    assert build_view(run, now=time.time() + 500).is_over, "the launcher is gone as well"


def test_a_failure_that_made_micro_batches_smaller_is_not_the_end(write_run: Callable[..., Path]) -> None:
    run = write_run("a")
    write_status(run, "failed", 1)
    assert build_view(run).is_over
    (run / "memory.json").write_text("{}", encoding="utf-8")
    assert not build_view(run).is_over
    assert build_view(run, now=time.time() + 500).is_over
    write_status(run, "preempted", 75)
    assert build_view(run).is_over, "it was asked to stop"


def test_the_queue_is_asked_now_and_then_and_nobody_waits_for_it(tmp_path: Path) -> None:
    asked, may_answer = [], threading.Event()

    def answer(run: Path) -> QueueState:
        asked.append(run)
        may_answer.wait(60)
        return queued("PENDING")

    queue = QueuePoller(answer, seconds_between=1_000)
    assert queue(tmp_path) is None
    assert queue.is_polling
    may_answer.set()
    while queue.is_polling:
        time.sleep(0.01)
    assert [queue(tmp_path) for _ in range(5)] == [queued("PENDING")] * 5
    assert asked == [tmp_path]


def test_only_what_is_new_is_read_unless_a_resume_has_cut_it_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)

    def losses() -> list[float]:
        return [line["loss"] for line in file.read()["train"].values()]

    def lines(*values: float) -> str:
        return "".join(
            json.dumps({"event": "train", "step": step, "loss": value}) + "\n" for step, value in enumerate(values, 1)
        )

    assert losses() == []
    path.write_text(lines(5, 4, 3) + '{"event": "tr', encoding="utf-8")
    assert losses() == [5, 4, 3]
    path.write_text("x" * len(lines(5, 4)) + lines(5, 4, 3, 2)[len(lines(5, 4)) :], encoding="utf-8")
    assert losses() == [5, 4, 3, 2], "what was read is not read again"
    for text, expected in ((lines(5), [5]), (lines(5, 9, 8, 7, 6), [5, 9, 8, 7, 6])):
        path.write_text(text, encoding="utf-8")
        assert losses() == expected


def test_a_hostile_name_is_only_text(write_run: Callable[..., Path]) -> None:
    assert "[red]a" in draw(write_run("[red]a"))


def draw(run: Path, now: float | None = None) -> str:
    text = io.StringIO()
    Console(file=text, width=80).print(render(build_view(run, now=now), 80))
    assert max(map(len, text.getvalue().splitlines())) <= 80
    return text.getvalue()


def test_a_curve() -> None:
    lines = draw_curve([4.0, 3.0, 2.0, 1.0, math.nan], width=14, height=2)
    assert lines[0].startswith("  4.0000 ┤█")
    assert lines[1].startswith("  1.0000 ┤█")
    assert draw_curve([], width=10) == []
    for top in (1.0, 123456.7):
        assert {len(line) for line in draw_curve([top, *[1.0] * 499], width=30)} == {30}


@pytest.mark.parametrize("color", ["truecolor", None], ids=["in colour", "without colour"])
@pytest.mark.parametrize("width", [60, 80, 200])
def test_no_line_is_wider_than_the_terminal_and_no_row_of_the_curve_breaks(
    write_run: Callable[..., Path], width: int, color: Literal["truecolor"] | None
) -> None:
    run = write_run("a-run-with-a-name-that-is-as-long-as-names-of-runs-become-in-a-sweep", 400, state="running")
    status = {
        "state": "running",
        "message": "a message that says what was wrong, and where, and what to do about it " * 2,
    }
    (run / "status.json").write_text(json.dumps(status), encoding="utf-8")
    view = dataclasses.replace(build_view(run), losses=[12345.678, *(300 / step for step in range(1, 400))])
    text = io.StringIO()
    Console(file=text, width=width, color_system=color, force_terminal=color is not None).print(render(view, width))
    assert ("\x1b[" in text.getvalue()) == (color is not None)
    lines = Text.from_ansi(text.getvalue()).plain.splitlines()
    assert max(map(len, lines)) <= width
    rows = [re.fullmatch(r"│ ([ \d.]{10} [┤│][ ▁▂▃▄▅▆▇█]*) │", line) for line in lines[-9:-1]]
    assert all(rows), "a row that breaks is two, of which one has no label"
    assert len({len(line) for line in lines}) == 1, "the frame is straight"
