"""A run as it goes."""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from launcher.watch import build_view, draw_curve, render


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
    assert "nothing written for 2 h 01 min: likely killed; onecurve resume goes on" in shown
    assert " left" not in shown


def test_restarts_are_counted(write_run: Callable[..., Path]) -> None:
    run = write_run("a", num_starts=3)
    assert build_view(run).num_restarts == 2
    assert "started again 2 times" in draw(run)
    assert build_view(write_run("b")).num_restarts is None


def test_the_queue_is_asked(write_run: Callable[..., Path]) -> None:
    run = write_run("a", state="running")
    view = build_view(run, queue=lambda path: f"PENDING {path.name}")
    assert view.queue_state == "PENDING a"
    text = io.StringIO()
    Console(file=text, width=80).print(render(view))
    assert "PENDING a" in text.getvalue()


def test_a_hostile_name_is_only_text(write_run: Callable[..., Path]) -> None:
    assert "[red]a" in draw(write_run("[red]a"))


def draw(run: Path, now: float | None = None) -> str:
    text = io.StringIO()
    Console(file=text, width=80).print(render(build_view(run, now=now), 64))
    assert max(map(len, text.getvalue().splitlines())) <= 80
    return text.getvalue()


def test_a_curve() -> None:
    lines = draw_curve([4.0, 3.0, 2.0, 1.0, math.nan], width=4, height=2)
    assert lines[0].startswith("  4.0000 ┤█")
    assert lines[1].startswith("  1.0000 ┤█")
    assert draw_curve([], width=10) == []
    assert len(draw_curve([1.0] * 500, width=30)[0]) == len("  1.0000 ┤") + 30
