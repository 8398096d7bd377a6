"""Every subcommand in a real terminal of 80 columns."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pexpect
import pytest

from tests.launcher.conftest import ROOT
from tests.messages import names
from tools.jobs import write_held_task

Terminal = Callable[..., Any]

_CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
# A command to be copied is one line, however wide.
_COPYABLE = re.compile(r"accelerate launch|^(/|onecurve: )")


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    """Start the command line in a terminal: terminal("check"); what is still running at the end is ended."""
    children = []

    def start(*words: object) -> Any:
        child = pexpect.spawn(
            sys.executable,
            ["-m", "onecurve", *map(str, words)],
            cwd=str(ROOT),
            env={**os.environ, "TERM": "xterm-256color"},
            dimensions=(40, 80),
            encoding="utf-8",
            timeout=60,
        )
        children.append(child)
        return child

    yield start
    for child in children:
        child.close(force=True)


def _finish(child: Any) -> tuple[int, str]:
    """Exit code and what was on the screen."""
    shown = child.read()
    child.wait()
    return child.exitstatus, _CODES.sub("", shown).replace("\r", "\n")


@pytest.mark.parametrize(
    ("words", "exit_code", "needed"),
    [
        (["run", "RECIPE", "--dry-run"], 0, ("cpu",)),
        (["check", "RECIPE"], 0, ("model", "bert")),
        (["check", "RECIPE", "--train_file", "nowhere.jsonl"], 2, ("error", "train_file", "'nowhere.jsonl'")),
        (["plan", "RECIPE", "--devices", "8xH100-80GB"], 0, ("DDP", "FSDP2", "ZeRO-3")),
        (["compare", "ONE", "TWO"], 0, ("learning_rate",)),
        (["watch", "ONE"], 0, ("finished",)),
        (["report", "ONE"], 0, ("report.html",)),
        (["resume", "ONE", "--dry-run"], 2, ("onecurve", "model_name_or_path")),
        (["predict", "ONE", "--input", "a.csv", "--output", "b.csv"], 2, ("final/",)),
        (["--help"], 0, ("Commands:",)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_a_screen_of_each_command(
    words: list[str],
    exit_code: int,
    needed: tuple[str, ...],
    terminal: Terminal,
    recipe_file: Path,
    write_run: Callable[..., Path],
) -> None:
    runs = {"ONE": write_run("one"), "TWO": write_run("two", learning_rate=3.0), "RECIPE": recipe_file}
    code, shown = _finish(terminal(*(runs.get(word, word) for word in words)))
    assert names(shown, *needed)
    assert code == exit_code
    assert "Traceback" not in shown
    wide = [line for line in shown.splitlines() if len(line) > 80 and not _COPYABLE.search(line)]
    assert not wide, wide


def test_the_doctor(terminal: Terminal) -> None:
    _, shown = _finish(terminal("check"))
    assert shown.startswith("machine   ")


def test_watch_follows_until_the_end(terminal: Terminal, write_run: Callable[..., Path]) -> None:
    run = write_run("one", state="running")
    child = terminal("watch", run, "--every", "0.2")
    child.expect("running")
    (run / "status.json").write_text(json.dumps({"state": "finished", "exit_code": 0}), encoding="utf-8")
    child.expect("finished")
    assert _finish(child)[0] == 0


def write_state(run: Path, state: str, exit_code: int | None, **more: int) -> None:
    content = json.dumps({"state": state, "exit_code": exit_code, **more})
    (run / "new").write_text(content, encoding="utf-8")
    (run / "new").replace(run / "status.json")


def test_watch_follows_over_a_restart(terminal: Terminal, write_run: Callable[..., Path]) -> None:
    run = write_run("one", state="running")
    child = terminal("watch", run, "--every", "0.2")
    child.expect("running")
    write_state(run, "failed", 1, restarts_left=1)
    child.expect("1 more restart")
    write_state(run, "running", None)
    child.expect("running")
    write_state(run, "failed", 1)
    child.expect("failed")
    assert _finish(child)[0] == 0


def write_program(path: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program of Slurm's on the path, which notes that it was asked."""
    path.write_text(f"#!/bin/sh\necho asked >> {path.parent}/asked\n{script}\n", encoding="utf-8")
    path.chmod(0o755)
    folder = path.parent
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_watch_follows_a_job_that_is_queued_again(
    terminal: Terminal, write_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_program(
        tmp_path / "squeue", "printf '%-30s%-80s%-12s%-24s%-400s\\n' PENDING BeginTime 1 1:00 ''", monkeypatch
    )
    run = write_run("one", state="preempted")
    (run / "slurm_job_id").write_text("7\n", encoding="utf-8")
    child = terminal("watch", run, "--every", "0.2")
    child.expect("preempted")
    child.expect(r"Slurm job 7: PENDING \(BeginTime\); queued again 1 time")
    for number in range(8):  # Each is a look.
        with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
            line = {"event": "train", "step": 100 + number, "epoch": 1, "loss": 1, "tokens": 1, "tokens_per_second": 1}
            file.write(f"\n{json.dumps(line)}\n")
        child.expect(f"step {100 + number}")
    write_state(run, "running", None)
    child.expect("running")
    write_state(run, "finished", 0)
    child.expect("finished")
    assert _finish(child)[0] == 0
    assert (tmp_path / "asked").read_text(encoding="utf-8") == "asked\n", "once, however often the view is drawn"


def test_a_slow_queue_holds_nobody_back(
    terminal: Terminal, write_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_program(tmp_path / "squeue", "exec sleep 50", monkeypatch)
    run = write_run("one", state="running")
    (run / "slurm_job_id").write_text("7\n", encoding="utf-8")
    child = terminal("watch", run)
    child.timeout = 25
    child.expect("running")
    child.sendintr()
    assert _finish(child)[0] == 0


def test_watch_ends_quietly_when_one_has_seen_enough(terminal: Terminal, write_run: Callable[..., Path]) -> None:
    child = terminal("watch", write_run("one", state="running"))
    child.expect("running")
    child.sendintr()
    code, shown = _finish(child)
    assert code == 0
    assert "Traceback" not in shown


def test_a_screen_of_slurms_commands(
    terminal: Terminal, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_program(tmp_path / "sbatch", "echo 'sbatch: Job 7 to start now' >&2", monkeypatch)
    write_program(tmp_path / "squeue", "exit 1", monkeypatch)
    write_program(tmp_path / "scancel", "", monkeypatch)
    code, shown = _finish(terminal("submit", recipe_file, "--dry-run"))
    assert (code, "Job 7 to start now" in shown, "finetune.sh --config" in shown) == (0, True, True), shown
    code, shown = _finish(terminal("cancel", "7"))
    assert (code, len(shown.strip().splitlines())) == (0, 1), shown
    assert names(shown, "job 7")
    code, shown = _finish(terminal("cancel", "nowhere"))
    assert (code, len(shown.strip().splitlines())) == (2, 1), shown
    assert names(shown, "onecurve", "'nowhere'")


@pytest.mark.slow
def test_a_screen_of_fetch(terminal: Terminal, recipe_file: Path) -> None:
    code, shown = _finish(terminal("fetch", recipe_file))
    assert (code, names(shown, "train.jsonl", "203", "61")) == (0, True), shown


@pytest.mark.slow
def test_ctrl_c_leaves_a_checkpoint_and_resume_ends_the_training(
    terminal: Terminal, recipe_file: Path, recipe: dict[str, Any], tmp_path: Path
) -> None:
    held = write_held_task(tmp_path, step=3)
    child = terminal("run", recipe_file, "--max_train_steps", "20", "--task", held.task)
    child.timeout = 300
    child.expect(r"tokens/s")
    held.wait_until_reached()
    child.sendintr()
    child.expect("SIGINT")
    assert _finish(child)[0] == 75
    steps = (Path(recipe["output_dir"]) / "metrics.jsonl").read_text(encoding="utf-8").count("\n")
    assert 3 < steps < 20
    child = terminal("resume", recipe["output_dir"])
    child.timeout = 300
    child.expect("step_000000")
    assert _finish(child)[0] == 0
    child = terminal(
        "predict", recipe["output_dir"], "--input", recipe["validation_file"], "--output", tmp_path / "labelled.jsonl"
    )
    child.timeout = 300
    assert _finish(child)[0] == 0
    assert (tmp_path / "labelled.jsonl").read_text(encoding="utf-8").count("\n") == 61
