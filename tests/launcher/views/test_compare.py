"""Runs side by side."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from onecurve.launcher.facts.history import load_history
from onecurve.launcher.views.compare import build_comparison, print_comparison


def test_only_what_differs_is_shown_and_the_best_is_found(write_run: Callable[..., Path]) -> None:
    histories = [load_history(write_run("a", learning_rate=0.1)), load_history(write_run("b", 10, learning_rate=0.2))]
    comparison = build_comparison(histories)
    assert comparison["runs"] == ["a", "b"]
    assert comparison["differing_settings"] == {"learning_rate": [0.1, 0.2]}
    assert comparison["final"]["loss"] == [0.1, 0.2]
    assert comparison["best"]["eval_accuracy"][0] == {"value": 0.9, "step": 10}
    assert comparison["best"]["eval_loss"][1] == {"value": 0.4, "step": 5}
    assert comparison["cost"]["training_seconds"] == [40.0, 20.0]
    assert comparison["cost"]["device_hours"][0] == round(2 * 40 / 3600, 4)
    text = io.StringIO()
    print_comparison(Console(file=text, width=100), comparison)
    assert "learning_rate" in text.getvalue()
    assert "0.9000 at 10" in text.getvalue()


def test_a_run_without_an_evaluation(write_run: Callable[..., Path]) -> None:
    run = write_run("a")
    (run / "metrics.jsonl").unlink()
    comparison = build_comparison([load_history(run), load_history(write_run("b"))])
    assert comparison["final"]["eval_loss"] == [None, 0.5]
    assert comparison["steps"] == [0, 20]


def test_cost_is_what_the_runs_have_told(write_run: Callable[..., Path]) -> None:
    comparison = build_comparison([load_history(write_run("a", num_starts=2)), load_history(write_run("b"))])
    assert comparison["cost"]["restarts"] == [1, None]
    assert comparison["cost"]["peak_memory_bytes"] == [2**30 + 20] * 2
    text = io.StringIO()
    print_comparison(Console(file=text, width=80), comparison)
    assert "1.00 GiB" in text.getvalue()
