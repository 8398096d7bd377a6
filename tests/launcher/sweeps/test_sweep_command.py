"""`onecurve sweep` as it is typed: what it refuses, what it shows, and one that is killed and goes on."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from onecurve.launcher.cli import run_command_line
from tests.conftest import Run
from tests.launcher.conftest import Onecurve
from tests.launcher.sweeps.conftest import Start, Trainings, WriteSweep
from tests.messages import names
from tools.jobs import write_held_task
from tools.launches import LaunchServer, build_environment

TPE = {"strategy": "tpe", "num_trials": 2}


@pytest.mark.parametrize(
    ("keys", "words", "needed"),
    [
        ({}, ["--nodes", "2"], ("--nodes", "--slurm")),
        ({}, ["--at-once", "2"], ("--at-once", "--slurm")),
        ({}, ["--slurm", "--max-restarts", "2"], ("--max-restarts", "--slurm")),
        ({}, ["--slurm", "--results"], ("--results", "--slurm")),
        ({}, ["--seed", "3"], ("--seed", "sweep.yaml")),
        ({}, ["--eval_only"], ("--eval_only",)),
        ({}, ["--learning_rat", "3"], ("learning_rat", "learning_rate")),
        ({}, ["--train_file", "nowhere.jsonl"], ("train_file", "nowhere.jsonl")),
        ({"num_trials": 3}, [], ("num_trials", "random", "tpe")),
        (TPE, ["--slurm"], ("tpe", "random")),
    ],
)
def test_what_is_refused_before_anything_starts(
    write_sweep: WriteSweep,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    keys: dict[str, Any],
    words: list[str],
    needed: tuple[str, ...],
) -> None:
    capsys.readouterr()
    assert run_command_line(["sweep", str(write_sweep(metric="loss", **keys)), *words]) == 2
    captured = capsys.readouterr()
    assert names(captured.err, *needed)
    assert captured.err.startswith("onecurve: ")
    assert not (tmp_path / "run").exists(), "nothing is written"


def test_a_job_of_several_nodes_is_refused(
    write_sweep: WriteSweep, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"JOB_ID": "7", "JOB_NUM_NODES": "2", "JOB_NODELIST": "node[1-2]"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert run_command_line(["sweep", str(write_sweep(metric="loss"))]) == 2
    assert names(capsys.readouterr().err, "2", "--slurm", "--nodes")


def test_without_optuna_tpe_is_refused(
    write_sweep: WriteSweep, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert run_command_line(["sweep", str(write_sweep(metric="loss", **TPE))]) == 2
    assert names(capsys.readouterr().err, "optuna", "onecurve[sweep]")


def test_a_dry_run_lists_the_trials_and_results_show_them(
    write_sweep: WriteSweep, start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, folder = str(write_sweep(metric="loss")), tmp_path / "sweep"
    words = ["sweep", path, "--output_dir", str(folder), "--json"]
    capsys.readouterr()
    assert run_command_line([*words, "--dry-run"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [trial["settings"]["seed"] for trial in shown["trials"]] == ["1", "2", "1", "2"]
    assert {trial["state"] for trial in shown["trials"]} == {"waiting"}
    assert not folder.exists()

    # As on Slurm, where the tasks of an array leave run directories and nothing else.
    trainings = Trainings(lambda overrides: [0.5])
    path = str(write_sweep())
    start(Path(path), trainings)
    (folder / "sweep.json").unlink()
    assert run_command_line([*words, "--results"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [(trial["state"], trial["value"]) for trial in shown["trials"]] == [("finished", 0.5)] * 4
    assert shown["best"] == 0
    assert run_command_line([*words[:-1], "--results"]) == 0
    shown_text = capsys.readouterr().out
    assert names(shown_text, "run_03", "learning_rate", "eval_accuracy")
    assert "peak memory" in shown_text or "training time" in shown_text, "the comparison of the best runs"
    assert "run_03" in (folder / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_sweep_that_is_killed_goes_on(
    onecurve: Onecurve,
    write_sweep: WriteSweep,
    tmp_path: Path,
    launch_server: LaunchServer,
) -> None:
    held = write_held_task(tmp_path, step=4)
    path = write_sweep(metric="loss", parameters={"max_train_steps": [2, 6]})
    words = ["sweep", str(path), "--task", held.task, "--json"]
    with (tmp_path / "output").open("w", encoding="utf-8") as output:
        # Forked as what goes on is: with as many threads, for the same bits.
        process = launch_server.start_script(["-m", "onecurve", *words], build_environment(), output, output)
        try:
            held.wait_until_reached(process, seconds=300)  # Two trainings start before.
        finally:
            process.kill()
            process.wait()
    result = onecurve(*words)
    assert result.returncode == 0, result.stderr
    results = json.loads(result.stdout)
    assert [trial["state"] for trial in results["trials"]] == ["finished", "finished"]
    first, second = (Run(0, "", "", tmp_path / "run" / f"run_{number:02d}") for number in (0, 1))
    assert (first.read("environment.json")["num_starts"], second.read("environment.json")["num_starts"]) == (1, 2)
    assert results["trials"][1]["value"] == pytest.approx(second.lines[-1]["eval_loss"])
    alone = Run(0, "", "", tmp_path / "alone")
    ended = onecurve("run", str(second.path / "config.yaml"), "--output_dir", str(alone.path))
    assert ended.returncode == 0, ended.stderr
    assert second.losses == alone.losses, "it resumed, and no step is missing or made twice"
