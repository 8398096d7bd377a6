"""`onecurve submit`, `cancel` and what it knows of a job, against a real Slurm."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import Run
from tests.messages import names
from tests.slurm.cluster import Cluster, wait_until
from tests.slurm.test_finetune import read_log

pytestmark = pytest.mark.slow

WriteRecipe = Callable[..., Path]
Train = Callable[[Mapping[str, Any]], Run]
Onecurve = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def onecurve(cluster: Cluster, tmp_path: Path) -> Onecurve:
    """Run the command line on the login node, in the test's folder."""

    def run(
        *words: object, folder: Path = tmp_path, environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        return cluster.run(sys.executable, "-m", "onecurve", *words, folder=folder, environment=environment)

    return run


Ask = Callable[[object], "dict[str, Any] | None"]

_ASK = """
import json, sys
from dataclasses import asdict
from onecurve.launcher.cluster.queue import find_job, find_run
state = find_job(sys.argv[1])
more = {"is_over": state.is_over, "described": state.describe(), "run": str(find_run(state.job_id))} if state else {}
print(json.dumps(state and {**asdict(state), **more}))
"""


@pytest.fixture
def ask(cluster: Cluster) -> Ask:
    """`find_job` on the login node."""

    def run(target: object) -> dict[str, Any] | None:
        result = cluster.run(sys.executable, "-c", _ASK, target)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)  # type: ignore[no-any-return]

    return run


@pytest.fixture
def write_sweep(write_recipe: WriteRecipe, tmp_path: Path) -> Callable[..., Path]:
    """A grid of four trials; their recipe's settings are given, and its run directories lie in `tmp_path/sweep`."""

    def write(**settings: Any) -> Path:
        path = tmp_path / "grid.yaml"
        parameters = {"learning_rate": [1e-4, 1e-3], "seed": [1, 2]}
        content = {"recipe": str(write_recipe("sweep", **settings)), "metric": "loss", "strategy": "grid"}
        path.write_text(yaml.safe_dump({**content, "parameters": parameters}), encoding="utf-8")
        return path

    return write


def test_a_sweep_and_its_comparison(
    cluster: Cluster,
    onecurve: Onecurve,
    write_sweep: Callable[..., Path],
    recipe: dict[str, Any],
    train: Train,
    ask: Ask,
    tmp_path: Path,
) -> None:
    words = [write_sweep(max_train_steps=20, dropout=0.1), "--slurm", "--at-once", 2, "--cpus-per-node", 1, "--json"]
    result = onecurve("sweep", *words)
    assert result.returncode == 0, result.stderr
    submitted = json.loads(result.stdout)
    array, comparison = submitted["job_id"], submitted["comparison_id"]

    def has_begun() -> bool:
        return any(f"({array}_1), start 1" in log.read_text(encoding="utf-8") for log in tmp_path.glob("slurm-*.out"))

    wait_until(has_begun, "task 1 begins", 60)
    states = cluster.run("squeue", "--noheader", "--array", f"--jobs={array}", "--format=%T").stdout.split()
    assert states.count("RUNNING") == 2
    assert states.count("PENDING") == 2
    task = ask(tmp_path / "sweep" / "run_03")
    assert task is not None
    assert (task["job_id"], task["state"]) == (f"{array}_3", "PENDING")
    assert task["run"] == str(tmp_path / "sweep" / "run_03")
    # A task is a job like any other: stopped, it goes on, and the comparison waits for it.
    # (scancel may send this signal twice, 5 s apart: see slurm/finetune.sh.)
    cluster.run("scancel", "--batch", "--signal=USR1", f"{array}_1")
    assert cluster.wait(comparison).state == "COMPLETED", read_log(tmp_path, comparison)
    stopped = ask(f"{array}_1")
    assert stopped is not None
    assert stopped["num_restarts"] >= 1
    log = (tmp_path / f"slurm-{comparison}.out").read_text(encoding="utf-8")
    for number, (learning_rate, seed) in enumerate([(1e-4, 1), (1e-4, 2), (1e-3, 1), (1e-3, 2)]):
        run = Run(0, "", "", tmp_path / "sweep" / f"run_{number:02d}")
        assert run.read("status.json")["state"] == "finished", log
        config = yaml.safe_load((run.path / "config.yaml").read_text(encoding="utf-8"))
        assert (config["learning_rate"], config["seed"]) == (learning_rate, seed)
        assert f"run_{number:02d}" in log
    assert "learning_rate" in log
    settings = {"max_train_steps": 20, "dropout": 0.1, "learning_rate": 1e-4, "seed": 2}
    alone = train({**recipe, **settings, "output_dir": str(tmp_path / "alone")})
    assert Run(0, "", "", tmp_path / "sweep" / "run_01").losses == alone.losses


def test_an_array_is_cancelled_after_a_task_has_ended(
    cluster: Cluster, onecurve: Onecurve, ask: Ask, tmp_path: Path
) -> None:
    script = '[ "$SLURM_ARRAY_TASK_ID" != 1 ] || sleep 1002'
    array = cluster.submit("--array=0-2", "--output=/dev/null", "--wrap", script, folder=tmp_path)
    states = ["squeue", "--noheader", "--states=all", "--array", f"--jobs={array}", "--format=%T"]
    wait_until(
        lambda: sorted(cluster.run(*states).stdout.split()) == ["COMPLETED", "COMPLETED", "RUNNING"], "two end", 60
    )
    state = ask(array)
    assert state is not None
    assert (state["state"], state["is_over"]) == ("RUNNING", False)
    result = onecurve("cancel", array)
    assert result.returncode == 0, result.stderr
    wait_until(lambda: "RUNNING" not in cluster.run(*states).stdout, "the third ends", 60)
    again = onecurve("cancel", array)
    assert again.returncode == 2
    assert f"job {array}" in again.stderr


def test_an_array_whose_comparison_is_refused_is_known(
    onecurve: Onecurve,
    cluster: Cluster,
    write_recipe: WriteRecipe,
    write_sweep: Callable[..., Path],
    tmp_path: Path,
) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    refuses = 'case "$*" in *afterany*) echo "sbatch: error: no more jobs" >&2; exit 1;; esac'
    text = f'#!/bin/sh\n{refuses}\nexec {shutil.which("sbatch")} "$@"\n'
    (folder / "sbatch").write_text(text, encoding="utf-8")
    (folder / "sbatch").chmod(0o755)
    variables = {"PATH": f"{folder}{os.pathsep}{cluster.environment['PATH']}"}
    words = [write_sweep(), "--slurm", "--sbatch=--begin=now+600", "--topology=cpu"]
    result = onecurve("sweep", *words, environment=variables)
    assert result.returncode == 2
    array = (tmp_path / "sweep" / "slurm_job_id").read_text(encoding="utf-8").strip()
    assert names(result.stderr, f"job {array}")
    assert "no more jobs" in result.stderr
    assert (tmp_path / "sweep" / "run_03" / "slurm_job_id").read_text(encoding="utf-8") == f"{array}_3\n"
    assert onecurve("cancel", array).returncode == 0
    unknown = onecurve("submit", write_recipe(), "--topology=multi_cpus")
    assert unknown.returncode == 2
    assert names(unknown.stderr, "multi_cpus", "multi_cpu")


def test_submitted_watched_and_cancelled(
    cluster: Cluster,
    onecurve: Onecurve,
    write_recipe: WriteRecipe,
    ask: Ask,
    tmp_path: Path,
) -> None:
    endless = {"max_train_steps": 100_000, "num_train_epochs": 10_000, "eval_steps": 100_000}
    run = tmp_path / "submitted"
    name = 'it\'s "odd" $(touch pwned)'
    words = [write_recipe("submitted", **endless), "--job-name", name, "--time", "30", "--sbatch=--begin=now+60"]
    result = onecurve("submit", *words)
    assert result.returncode == 0, result.stderr
    assert "to start at" in result.stderr
    job_id = result.stdout.split()[0]
    waiting = ask(run)
    assert waiting is not None
    assert (waiting["job_id"], waiting["state"], waiting["reason"]) == (job_id, "PENDING", "BeginTime")
    for target in (run, job_id):
        watched = onecurve("watch", target)
        assert watched.returncode == 0, watched.stderr
        assert names(watched.stdout, f"job {job_id}", "PENDING", "BeginTime")
    cluster.run("scontrol", "update", f"JobId={job_id}", "StartTime=now")
    wait_until(lambda: (run / "metrics.jsonl").exists(), "it trains", 240)
    running = ask(run)
    assert running is not None
    assert (running["state"], running["num_restarts"], running["is_over"]) == ("RUNNING", 0, False)
    assert running["nodes"] in ("node1", "node2")
    assert names(running["described"], f"job {job_id}", "RUNNING", running["nodes"])
    assert running["run"] == str(run)
    watched = onecurve("watch", job_id)
    assert names(watched.stdout, f"job {job_id}", "RUNNING")
    assert "step " in watched.stdout

    result = onecurve("cancel", run)
    assert result.returncode == 0, result.stderr
    assert cluster.wait(job_id).state == "CANCELLED"
    cancelled = ask(job_id)
    assert cancelled is not None
    assert cancelled["is_over"]
    again = onecurve("cancel", job_id)
    assert again.returncode == 2
    assert names(again.stderr, job_id, "CANCELLED")
    assert ask("4000000") is None
    assert ask(tmp_path) is None
    assert not list(tmp_path.rglob("pwned"))


def test_what_slurm_refuses_is_found_before(
    cluster: Cluster,
    onecurve: Onecurve,
    write_recipe: WriteRecipe,
    tmp_path: Path,
    write_sweep: Callable[..., Path],
) -> None:
    path, sweep = write_recipe(), write_sweep()
    refused: list[tuple[list[object], tuple[str, ...]]] = [
        (["--nodes", 3], ("node configuration",)),
        (["--gpus-per-node", 5], ("node configuration",)),
        (["--partition", "gpu"], ("invalid partition",)),
        (["--time", "soon"], ("Invalid --time",)),
        (["--sbatch=--constraint=h100"], ("Invalid feature",)),
        (["--learning_rat", "1"], ("learning_rat", "learning_rate")),
        (["--train_file", "nowhere.jsonl"], ("train_file", "'nowhere.jsonl'")),
        (["--model_name_or_path", "bert-base-cased"], ("model_name_or_path", "'bert-base-cased'", "onecurve fetch")),
        (["--job-name", "two\nlines"], ("control character",)),
    ]
    for words, needed in refused:
        result = onecurve("submit", path, *words)
        assert result.returncode == 2, words
        assert names(result.stderr, *needed), words
        assert "Traceback" not in result.stderr
    folder = tmp_path / "100%j"
    folder.mkdir()
    assert "as a pattern" in onecurve("submit", path, folder=folder).stderr
    assert cluster.run("squeue", "--noheader", "--states=PENDING,RUNNING").stdout == ""

    result = onecurve("submit", path, "--nodes", 2, "--gpus-per-node", 4, "--time", "1:00:00", "--dry-run")
    assert result.returncode == 0, result.stderr
    assert "--nodes=2 --gpus-per-node=4 --cpus-per-task=16 --time=1:00:00" in result.stdout
    array = onecurve("sweep", sweep, "--slurm", "--at-once", 2, "--dry-run").stdout.splitlines()
    assert "--array=0-3%2" in array[0]
    assert "--dependency=afterany:JOB" in array[1]
    assert cluster.run("squeue", "--noheader", "--states=PENDING,RUNNING").stdout == ""
