"""A run as it goes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.watch import build_view, draw_curve


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


def test_a_curve() -> None:
    lines = draw_curve([4.0, 3.0, 2.0, 1.0, math.nan], width=4, height=2)
    assert lines[0].startswith("  4.0000 ┤█")
    assert lines[1].startswith("  1.0000 ┤█")
    assert draw_curve([], width=10) == []
    assert len(draw_curve([1.0] * 500, width=30)[0]) == len("  1.0000 ┤") + 30
