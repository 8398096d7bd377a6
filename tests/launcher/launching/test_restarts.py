"""`--max-restarts`: what a crash loses is made again, and an ending that would repeat is final."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.launcher.conftest import ROOT, Onecurve
from tests.messages import names
from tools.jobs import HeldTask, write_held_task

pytestmark = pytest.mark.slow

_WORDS = ["--topology", "multi_cpu", "--max_train_steps", "60", "--eval_steps", "20", "--checkpointing_steps", "10"]


def _read_lines(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what depends on the clock or on memory."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [
        {key: value for key, value in line.items() if key not in ("tokens_per_second", "peak_memory_bytes")}
        for line in lines
    ]


def _find_rank(rank: int, recipe: Path) -> int | None:
    """The process of one rank, by its command line and environment."""
    for folder in Path("/proc").iterdir():
        try:
            is_ours = str(recipe).encode() in (folder / "cmdline").read_bytes()
            if is_ours and f"RANK={rank}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                return int(folder.name)
        except (OSError, ValueError):
            continue
    return None


def _start(recipe_file: Path, held: HeldTask) -> subprocess.Popen[str]:
    words = ["run", str(recipe_file), *_WORDS, "--task", held.task, "--max-restarts", "1"]
    return subprocess.Popen(
        [sys.executable, "-m", "onecurve", *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _wait_for_checkpoint(run: Path, held: HeldTask, process: subprocess.Popen[str]) -> None:
    """Wait until one checkpoint is there, and steps behind it that will be lost."""
    held.wait_until_reached(process)
    deadline = time.monotonic() + 120
    while not (run / "checkpoints" / "step_00000010" / "manifest.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.skipif(sys.platform != "linux", reason="finds the rank in /proc")
def test_a_killed_rank_costs_nothing_but_time(
    recipe_file: Path, recipe: dict[str, Any], tmp_path: Path, onecurve: Onecurve
) -> None:
    held = write_held_task(tmp_path, step=15)
    run, whole = Path(recipe["output_dir"]), Path(recipe["output_dir"] + "_whole")
    process = _start(recipe_file, held)
    try:
        _wait_for_checkpoint(run, held, process)
        rank = _find_rank(1, recipe_file)
        assert rank is not None
        os.kill(rank, signal.SIGKILL)
        out, told = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, told
    assert names(told, "restart 1 of 1")
    assert "step_000000" in out
    assert onecurve("run", recipe_file, *_WORDS, "--output_dir", whole, is_real=True).returncode == 0
    assert _read_lines(run) == _read_lines(whole), "the curve of a run that nobody killed, to the last bit"


@pytest.mark.skipif(sys.platform != "linux", reason="finds the launcher in /proc")
def test_a_killed_accelerate_costs_nothing_but_time(recipe_file: Path, recipe: dict[str, Any], tmp_path: Path) -> None:
    """Its processes are writing a checkpoint when the next start could begin."""
    held = write_held_task(tmp_path, step=15)
    run = Path(recipe["output_dir"])
    process = _start(recipe_file, held)
    try:
        _wait_for_checkpoint(run, held, process)
        rank = _find_rank(1, recipe_file)
        assert rank is not None
        launcher = Path(f"/proc/{rank}/status").read_text(encoding="utf-8").partition("PPid:")[2].split()[0]
        os.kill(int(launcher), signal.SIGKILL)
        out, told = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, told
    assert names(told, "restart 1 of 1")
    assert "step_000000" in out
    steps = [line["step"] for line in _read_lines(run) if line["event"] == "train"]
    assert steps == list(range(1, 61))


EXHAUSTED = """
import os
import torch
from onecurve.training.tasks.text_classification import TextClassification


class Exhausted(TextClassification):
    def loss_sum(self, model, batch):
        if len(batch["input_ids"]) > 3 and os.environ["RANK"] == "1":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().loss_sum(model, batch)
"""


def test_a_rank_without_memory_gets_smaller_micro_batches_until_they_fit(
    recipe_file: Path, recipe: dict[str, Any], tmp_path: Path, onecurve: Onecurve
) -> None:
    """No restart was asked for."""
    task = tmp_path / "exhausted.py"
    task.write_text(EXHAUSTED, encoding="utf-8")
    words = [
        "--topology",
        "multi_cpu",
        "--max_train_steps",
        "4",
        "--train_batch_size",
        "16",
        "--per_device_batch_size",
        "8",
    ]
    whole, run = Path(recipe["output_dir"] + "_whole"), Path(recipe["output_dir"])
    assert onecurve("run", recipe_file, *words, "--output_dir", whole).returncode == 0
    result = onecurve("run", recipe_file, *words, "--task", f"{task}:Exhausted", is_real=True)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("smaller micro-batches") == 2, "of 4 and of 2 examples"
    losses = [[line["loss"] for line in _read_lines(each) if line["event"] == "train"] for each in (run, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_bad_input_is_not_tried_again(recipe_file: Path, recipe: dict[str, Any], onecurve: Onecurve) -> None:
    """Found by the training alone: `check` reads only the first rows."""
    path = Path(recipe["train_file"])
    rows = path.read_text(encoding="utf-8").splitlines()
    bad = path.with_name("late.jsonl")
    bad.write_text("\n".join([*rows, *rows, '{"text": "", "label": "tech"}']) + "\n", encoding="utf-8")
    result = onecurve("run", recipe_file, "--train_file", bad, "--max-restarts", "3")
    assert result.returncode == 2, result.stderr
    assert "restart" not in result.stderr
    assert result.stderr.count("onecurve: ") == 1


def test_a_stop_is_not_tried_again(recipe_file: Path, recipe: dict[str, Any]) -> None:
    words = ["run", str(recipe_file), "--max_train_steps", "100000", "--max-restarts", "3"]
    process = subprocess.Popen(
        [sys.executable, "-m", "onecurve", *words],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        metrics = Path(recipe["output_dir"]) / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 75, told
    assert "restart" not in told
