"""metrics.jsonl: what a line holds, what a resumed run keeps, and a number that is none ends the run."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onecurve.training.data.plan import MicroBatch, Order, TrainingPlan
from onecurve.training.errors import Diverged
from onecurve.training.record import reporter as module
from onecurve.training.record.reporter import STEPS_LATE, Reporter, cut_back
from onecurve.training.recovery.milestones import Progress
from onecurve.training.run_directory import RunDirectory
from tests.messages import names, naming

LENGTHS = np.array([5, 1, 9, 3, 7, 2, 8, 4, 6, 10])
NUM_STEPS = 5


class Tracked:
    """The part of an Accelerator that a report needs."""

    is_main_process = True

    def __init__(self, mixed_precision: str = "no") -> None:
        self.mixed_precision = mixed_precision
        self.logged: list[tuple[int, dict[str, float]]] = []

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))


# Ten examples of 1 to 10 tokens in batches of four, in micro-batches of two.
PLAN = TrainingPlan(Order(10, 4, 42, LENGTHS), NUM_STEPS, num_processes=1, max_examples=2)


def plan_step(step: int) -> MicroBatch:
    return PLAN.micro_batches(step)[-1]


def build(folder: Path, tracked: Tracked, start_step: int = 0) -> Reporter:
    run = RunDirectory(folder / "run")
    return Reporter(run, cast("Accelerator", tracked), PLAN, Progress(start_step), ["loss"])


def report(reporter: Reporter, step: int, loss: float = 0.5, grad_norm: float = 2.0) -> None:
    """A step whose loss is `loss`, on processes of which none is asked to stop."""
    reporter.log_step(plan_step(step), torch.tensor([loss, 0.0, 0.0]), torch.tensor(grad_norm), 1e-3)


def read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


# Lines ---------------------------------------------------------------------------------------------------------------


def test_a_line_says_what_its_step_was(tmp_path: Path) -> None:
    tracked = Tracked()
    with build(tmp_path, tracked) as reporter:
        for step in range(3):
            report(reporter, step, loss=0.25 * (step + 1), grad_norm=step)
        reporter.flush()
    lines = read(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert [line["epoch"] for line in lines] == [0.3333, 0.6667, 1.0]
    assert [line["loss"] for line in lines] == [0.25, 0.5, 0.75]
    assert [line["grad_norm"] for line in lines] == [0, 1, 2]
    assert [line["examples"] for line in lines] == [4, 4, 2]
    assert sum(line["tokens"] for line in lines) == LENGTHS.sum(), "every token of the epoch is counted once"
    assert all(line["tokens_per_second"] > 0 for line in lines)
    assert [line.pop("examples_digest") for line in lines] == [plan_step(step).examples_digest for step in range(3)]
    logged = [{"event": "train", "step": step, **values} for step, values in tracked.logged]
    assert logged == lines, "a tracker gets every number"


def test_padding_is_the_share_of_tokens_that_are_none(tmp_path: Path) -> None:
    with build(tmp_path, Tracked()) as reporter:
        report(reporter, 0)
        reporter.flush()
    lengths = np.sort(LENGTHS[Order(10, 4, 42, LENGTHS).global_batch(0)])
    (line,) = read(tmp_path)
    # Padded to the longest of each micro-batch; which two go together is the plan's choice.
    plan = TrainingPlan(Order(10, 4, 42, LENGTHS), 1, num_processes=1, max_examples=2).micro_batches(0)
    padded = sum(len(micro_batch.indices) * int(LENGTHS[micro_batch.indices].max()) for micro_batch in plan)
    assert line["tokens"] == lengths.sum()
    assert line["padding"] == round(1 - lengths.sum() / padded, 4)
    assert 0 < line["padding"] < 1


def test_lines_are_written_late_and_flushed_before_an_evaluation(tmp_path: Path) -> None:
    with build(tmp_path, Tracked()) as reporter:
        for step in range(STEPS_LATE + 1):
            report(reporter, step)
        assert math.isfinite(reporter.last_loss), "the oldest is written"
        reporter.log_evaluation(STEPS_LATE + 1, {"eval_loss": 0.1})
    lines = read(tmp_path)
    assert [line["step"] for line in lines] == [*range(1, STEPS_LATE + 2), STEPS_LATE + 1]
    assert lines[-1] == {"event": "eval", "step": STEPS_LATE + 1, "eval_loss": 0.1}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_a_number_that_is_not_finite_ends_the_run(tmp_path: Path, name: str, value: float) -> None:
    tracked = Tracked()
    with build(tmp_path, tracked) as reporter:
        report(reporter, 0)
        report(reporter, 1, **{name: value})
        with pytest.raises(Diverged, match=naming(name, str(value), "step 2", "learning_rate")):
            reporter.flush()
    assert [line["step"] for line in read(tmp_path)] == [1], "the last line is the last good step"
    assert [step for step, _ in tracked.logged] == [1]


def test_divergence_is_noticed_a_few_steps_late_without_a_flush(tmp_path: Path) -> None:
    with build(tmp_path, Tracked()) as reporter:
        report(reporter, 0, loss=math.nan)
        for step in range(1, STEPS_LATE):
            report(reporter, step)
        with pytest.raises(Diverged, match="at step 1"):
            report(reporter, STEPS_LATE)


def test_fp16_may_step_over_an_overflow(tmp_path: Path) -> None:
    with build(tmp_path, Tracked(mixed_precision="fp16")) as reporter:
        report(reporter, 0, grad_norm=math.inf)
        reporter.flush()
        report(reporter, 1, loss=math.nan)
        with pytest.raises(Diverged, match=naming("loss", "nan", "step 2")):
            reporter.flush()


def test_fp16_that_skips_every_step_has_diverged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_STEPS_SKIPPED", 2)
    with build(tmp_path, Tracked(mixed_precision="fp16")) as reporter:
        for step, norm in enumerate((math.inf, math.nan, 1.0, math.inf, math.inf)):  # Never three in succession.
            report(reporter, step, grad_norm=norm)
        reporter.flush()
        report(reporter, 4, grad_norm=math.inf)
        with pytest.raises(Diverged, match=naming("3 steps", "fp16", "step 5")):
            reporter.flush()


def test_a_resumed_run_goes_on_in_the_same_file(tmp_path: Path) -> None:
    with build(tmp_path, Tracked()) as reporter:
        for step in range(4):
            report(reporter, step)
        reporter.flush()
    with build(tmp_path, Tracked(), start_step=2) as reporter:
        for step in range(2, NUM_STEPS):
            report(reporter, step, loss=0.125)
        reporter.flush()
    assert [(line["step"], line["loss"]) for line in read(tmp_path)] == [
        (1, 0.5), (2, 0.5), (3, 0.125), (4, 0.125), (5, 0.125),
    ]  # fmt: skip


# Cutting back --------------------------------------------------------------------------------------------------------

LINES = [
    {"event": "train", "step": 1, "loss": 0.5},
    {"event": "train", "step": 2, "loss": 0.4},
    {"event": "eval", "step": 2, "eval_loss": 0.45},
    {"event": "train", "step": 3, "loss": 0.3},
    {"event": "eval", "step": 3, "eval_loss": 0.35},
]
TEXT = "".join(json.dumps(line) + "\n" for line in LINES)


@pytest.mark.parametrize(("step", "kept"), [(0, 0), (1, 1), (2, 3), (3, 5), (99, 5)])
def test_lines_after_the_checkpoint_go(tmp_path: Path, step: int, kept: int) -> None:
    (tmp_path / "metrics.jsonl").write_text(TEXT)
    cut_back(tmp_path / "metrics.jsonl", Progress(step))
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(TEXT.splitlines(keepends=True)[:kept])
    assert len(list(tmp_path.iterdir())) == 1


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.integers(0, len(TEXT)), st.integers(1, 3))
def test_a_half_written_line_goes(tmp_path: Path, num_written: int, step: int) -> None:
    """Wherever the writing process was killed."""
    path = tmp_path / "metrics.jsonl"
    path.write_text(TEXT[:num_written])
    cut_back(path, Progress(step))
    whole = [line for line in LINES if TEXT.index(json.dumps(line)) + len(json.dumps(line)) <= num_written]
    assert path.read_text() == "".join(json.dumps(line) + "\n" for line in whole if cast("int", line["step"]) <= step)


def test_without_a_file_there_is_nothing_to_cut(tmp_path: Path) -> None:
    assert cut_back(tmp_path / "metrics.jsonl", Progress(3)) is None
    assert list(tmp_path.iterdir()) == []


def test_what_is_written_again_goes(tmp_path: Path) -> None:
    """The run was killed after an evaluation that its checkpoint holds to be due, or after that of the test data."""
    path = tmp_path / "metrics.jsonl"
    path.write_text(TEXT + json.dumps({"event": "test", "step": 3, "test_loss": 0.4}) + "\n")
    cut_back(path, Progress(3))
    assert path.read_text() == TEXT
    cut_back(path, Progress(3, evaluation_is_due=True))
    assert path.read_text() == "".join(TEXT.splitlines(keepends=True)[:4])


@pytest.mark.parametrize(("missing", "count"), [((2,), 1), ((3,), 1), ((2, 3), 2), ((1,), 0), ((1, 2, 3), 0)])
def test_lines_that_are_missing_are_told(tmp_path: Path, missing: tuple[int, ...], count: int) -> None:
    """Not those before the first: the run may have begun at another's checkpoint."""
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES if line["step"] not in missing))
    told = cut_back(path, Progress(3))
    assert names(told, f"{count} steps", "step 4") == bool(count)


def test_lines_are_on_the_disk_before_a_checkpoint_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[list[dict[str, Any]]] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(read(tmp_path)))
    with build(tmp_path, Tracked()) as reporter:
        report(reporter, 0)
        reporter.flush()
    assert [line["step"] for line in synced[-1]] == [1]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("event", ["eval", "test"])
def test_an_evaluation_whose_loss_is_not_finite_ends_the_run(tmp_path: Path, event: str, value: float) -> None:
    with build(tmp_path, Tracked()) as reporter:
        report(reporter, 0)
        with pytest.raises(Diverged, match=naming(f"{event}_loss", str(value), "step 1", "learning_rate")):
            reporter.log_evaluation(1, {f"{event}_loss": value}, event)
    assert [line["event"] for line in read(tmp_path)] == ["train"]
