"""slurm/finetune.sh on a real cluster: what is granted is used, and no ending of a job loses or repeats a step."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import ROOT, Run
from tests.messages import names
from tests.slurm.cluster import Cluster, wait_until
from tests.slurm.conftest import skip
from tools.jobs import Job

pytestmark = pytest.mark.slow

FINETUNE = ROOT / "slurm" / "finetune.sh"
# With one thread, as in this process, sums are made in the same order.
ONE_THREAD = "--cpus-per-task=1"

# Long enough to be stopped half-way. Dropout is on: its random numbers must come back as well.
# Lines come with each evaluation; the hundreds of steps after one are time enough for a signal to arrive.
LONG = {"max_train_steps": 300, "eval_steps": 50, "dropout": 0.1}

Train = Callable[[Mapping[str, Any]], Run]
WriteRecipe = Callable[..., Path]


def read_curve(run: Path) -> bytes:
    """metrics.jsonl, byte for byte, without what a clock has measured."""
    return re.sub(rb'"(tokens_per_second|peak_memory_bytes)": [\d.]+', b"", (run / "metrics.jsonl").read_bytes())


def count_lines(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return len(metrics.read_bytes().splitlines()) if metrics.exists() else 0


def read_log(folder: Path, job_id: str) -> str:
    """What the batch shell has said, and after it the nodes; for a person who looks at a test that failed."""
    paths = sorted(folder.glob(f"slurm-{job_id}*.out"), key=lambda path: len(path.name))
    return "".join(f"{path.name}:\n{path.read_text(encoding='utf-8', errors='replace')}\n" for path in paths)


def find_processes(words: str) -> list[str]:
    """Processes of this machine, hosts in namespaces included, that name something on their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if words in line and int(path.parent.name) != os.getpid():
            found.append(line)
    return found


def test_one_node_with_odd_names(
    cluster: Cluster, write_recipe: WriteRecipe, recipe: dict[str, Any], train: Train, tmp_path: Path
) -> None:
    odd = 'it\'s "odd" $(touch pwned) `touch pwned`; é [1] *'
    folder = tmp_path / odd
    folder.mkdir()
    path = write_recipe().rename(folder / f"{odd}.yaml")
    job_id = cluster.submit(
        ONE_THREAD,
        "--job-name",
        odd,
        FINETUNE,
        f"--config={path.name}",
        "--output_dir",
        odd,
        "--seed",
        "7",
        folder=folder,
    )
    job, log = cluster.wait(job_id), read_log(folder, job_id)
    assert (job.state, job.exit_code, job.num_restarts) == ("COMPLETED", 0, 0), log
    assert cluster.run("squeue", "--noheader", "--states=all", "--jobs", job_id, "--format=%j").stdout.strip() == odd
    assert not list(tmp_path.rglob("pwned"))
    assert {path.name for path in folder.iterdir()} == {
        f"{odd}.yaml", odd, f"slurm-{job_id}.out", f"slurm-{job_id}-node0.out"
    }, "what the nodes talked over is gone"  # fmt: skip
    run = folder / odd
    assert train({**recipe, "seed": 7}).exit_code == 0
    assert read_curve(run) == read_curve(Path(recipe["output_dir"])), "the same bits as without Slurm"
    environment = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    topology = environment["topology"]
    assert (environment["slurm_job_id"], topology["num_processes"]) == (job_id, 1)
    assert topology["threads_per_process"] == 1, "as many as cores were granted"


def test_two_nodes_with_two_processes_each(
    cluster: Cluster, write_recipe: WriteRecipe, recipe: dict[str, Any], train: Train, tmp_path: Path
) -> None:
    settings = {"max_train_steps": 52, "eval_steps": 26}
    path = write_recipe("two", **settings)
    job_id = cluster.submit("--nodes=2", FINETUNE, "--config", path, "--num_processes", 4, folder=tmp_path)
    job, log = cluster.wait(job_id), read_log(tmp_path, job_id)
    assert (job.state, job.exit_code) == ("COMPLETED", 0), log
    assert "--machine_rank 0" in (tmp_path / f"slurm-{job_id}-node0.out").read_text(encoding="utf-8")
    assert "--machine_rank 1" in (tmp_path / f"slurm-{job_id}-node1.out").read_text(encoding="utf-8")
    two = Run(0, "", "", tmp_path / "two")
    topology = two.read("environment.json")["topology"]
    assert (topology["num_machines"], topology["num_processes"], topology["backend"]) == (2, 4, "gloo")
    one = train({**recipe, **settings})
    assert len(two.steps) == 52
    assert two.losses == pytest.approx(one.losses, rel=1e-5)
    norms = [[line["grad_norm"] for line in run.steps] for run in (two, one)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_granted_gpus_are_counted_on_each_node(
    cluster: Cluster, write_recipe: WriteRecipe, write_nvidia_smi: Callable[[int], dict[str, str]], tmp_path: Path
) -> None:
    words = [FINETUNE, "--config", write_recipe(), "--dry-run", "--json"]
    gpus = write_nvidia_smi(4)
    several = cluster.submit(
        "--nodes=2", "--gpus-per-node=3", "--cpus-per-task=6", *words, environment=gpus, folder=tmp_path
    )
    # What a container needs: options of srun, and words in front of the command.
    inside = {**gpus, "ONECURVE_SRUN_OPTIONS": "--cpu-bind=none --quiet", "ONECURVE_CONTAINER": "env MALLOC_TOP_PAD_=1"}
    one = cluster.submit("--gpus-per-node=1", *words, environment=inside, folder=tmp_path)
    hidden = cluster.submit("--gpus-per-node=2", *words[:-2], folder=tmp_path)  # No nvidia-smi there.
    # The GPUs are not there, and neither is a PyTorch for them: that, and nothing else, stands in the way.
    ending, num_errors = (("COMPLETED", 0), 0) if torch.version.cuda else (("FAILED", 2), 1)
    for job_id in (several, one):
        job, log = cluster.wait(job_id), read_log(tmp_path, job_id)
        assert (job.state, job.exit_code) == ending, log
        found = json.loads((tmp_path / f"slurm-{job_id}-node0.out").read_text(encoding="utf-8"))["findings"]
        errors = [finding["message"] for finding in found if finding["severity"] == "error"]
        assert len(errors) == num_errors
        assert all(names(message, "CUDA") for message in errors)

    for rank in (0, 1):
        choice = json.loads((tmp_path / f"slurm-{several}-node{rank}.out").read_text(encoding="utf-8"))
        assert (choice["num_machines"], choice["num_processes"]) == (2, 6), "3 of the 4 on each node"
        assert choice["topology"] == "multi_node"
        options = dict(itertools.pairwise(choice["command"]))
        assert options["--machine_rank"] == str(rank)
        assert options["--main_process_ip"] == "node1"
        assert options["--main_process_port"] == str(20_000 + int(several))
    choice = json.loads((tmp_path / f"slurm-{one}-node0.out").read_text(encoding="utf-8"))
    assert (choice["topology"], choice["num_processes"]) == ("single_gpu", 1)

    job, log = cluster.wait(hidden), read_log(tmp_path, hidden)
    assert (job.state, job.exit_code) == ("FAILED", 2), log
    assert names(log, "2 GPUs", "nvidia-smi")
    refused = cluster.run("sbatch", "--gpus-per-node=5", *words, folder=tmp_path)
    assert refused.returncode != 0
    assert names(refused.stderr, "node configuration")


def test_stopped_twice_and_queued_again(
    cluster: Cluster, write_recipe: WriteRecipe, recipe: dict[str, Any], train: Train, tmp_path: Path
) -> None:
    path, run = write_recipe("stopped", **LONG), tmp_path / "stopped"
    job_id = cluster.submit(ONE_THREAD, FINETUNE, "--config", path, folder=tmp_path)
    after = ["--dependency", f"afterok:{job_id}", "--output", tmp_path / "after.out", "--wrap", "echo after"]
    dependent = cluster.submit(*after)
    for num_stops, num_lines in ((1, 50), (2, 100)):
        wait_until(lambda: count_lines(run) >= num_lines, f"{num_lines} lines", 240)  # noqa: B023
        assert cluster.job(job_id).num_restarts == num_stops - 1
        cluster.run("scancel", "--batch", "--signal=USR1", job_id)
        wait_until(lambda: cluster.job(job_id).num_restarts == num_stops, "queued again", 240)  # noqa: B023
        assert cluster.job(dependent).state == "PENDING", "a job that is queued again has not ended"
    job, log = cluster.wait(job_id), read_log(tmp_path, job_id)
    assert (job.state, job.exit_code, job.num_restarts) == ("COMPLETED", 0, 2), log
    assert log.count("the time limit is near") == 2
    assert all(f"start {number}, on node" in log for number in (1, 2, 3)), "the log of each start is kept"

    assert train({**recipe, **LONG, "output_dir": str(tmp_path / "whole")}).exit_code == 0
    assert read_curve(run) == read_curve(tmp_path / "whole")
    weights = [(folder / "final" / "model.safetensors").read_bytes() for folder in (run, tmp_path / "whole")]
    assert weights[0] == weights[1]

    assert cluster.wait(dependent, seconds=30).state == "COMPLETED"
    # Finished: another start changes nothing and is not queued again.
    again = cluster.submit(FINETUNE, "--config", path, folder=tmp_path)
    assert (cluster.wait(again).state, cluster.job(again).num_restarts) == ("COMPLETED", 0)
    assert read_curve(run) == read_curve(tmp_path / "whole")


def test_stopped_on_two_nodes(
    cluster: Cluster, write_recipe: WriteRecipe, recipe: dict[str, Any], tmp_path: Path
) -> None:
    settings = {**LONG, "max_train_steps": 200}
    path, run = write_recipe("stopped", **settings), tmp_path / "stopped"
    job_id = cluster.submit(ONE_THREAD, "--nodes=2", FINETUNE, "--config", path, folder=tmp_path)
    wait_until(lambda: count_lines(run) >= 50, "50 lines", 240)
    cluster.run("scancel", "--batch", "--signal=USR1", job_id)
    job, log = cluster.wait(job_id), read_log(tmp_path, job_id)
    assert (job.state, job.exit_code, job.num_restarts, job.nodes) == ("COMPLETED", 0, 1, "node[1-2]"), log
    _train_uninterrupted({**recipe, **settings, "output_dir": str(tmp_path / "whole")}, 2)
    assert read_curve(run) == read_curve(tmp_path / "whole")
    weights = [(folder / "final" / "model.safetensors").read_bytes() for folder in (run, tmp_path / "whole")]
    assert weights[0] == weights[1]


def _train_uninterrupted(settings: dict[str, Any], num_processes: int) -> None:
    """What the job trained, on as many processes of this host and one thread each."""
    topology = "cpu" if num_processes == 1 else "multi_cpu"
    whole = Job(settings, topology, num_processes).finish()
    assert whole.exit_code == 0, whole.stdout


def test_time_limit_then_cancelled(cluster: Cluster, write_recipe: WriteRecipe, tmp_path: Path) -> None:
    path = write_recipe("endless", max_train_steps=100_000, num_train_epochs=10_000, eval_steps=100_000)
    run = tmp_path / "endless"
    job_id = cluster.submit("--signal=B:USR1@60", FINETUNE, "--config", path, folder=tmp_path)
    wait_until(lambda: count_lines(run) >= 10, "it trains", 240)
    # Slurm looks at limits every half minute, and sends the signal if it would else come too late: at its next look here.
    assert cluster.run("scontrol", "update", f"JobId={job_id}", "EndTime=now+90").returncode == 0
    wait_until(lambda: cluster.job(job_id).num_restarts == 1, "queued again before the limit", 90)
    assert "the time limit is near" in read_log(tmp_path, job_id)
    saved = json.loads((run / "status.json").read_text(encoding="utf-8"))
    assert saved["state"] == "preempted"
    assert cluster.run("scontrol", "update", f"JobId={job_id}", "TimeLimit=30").returncode == 0

    wait_until(lambda: count_lines(run) >= saved["step"] + 50, "it goes on", 240)
    cluster.run("scancel", job_id)
    job = cluster.wait(job_id)
    assert (job.state, job.num_restarts) == ("CANCELLED", 1), read_log(tmp_path, job_id)
    wait_until(lambda: not find_processes(str(path)), "nothing of it is left", 60)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1)), "no step twice, none missing"
    assert cluster.wait(job_id).state == "CANCELLED"


@pytest.mark.parametrize(("num_nodes", "lost"), [(1, "node1"), (2, "node2")])
def test_power_cut(
    cluster: Cluster,
    write_recipe: WriteRecipe,
    recipe: dict[str, Any],
    tmp_path: Path,
    num_nodes: int,
    lost: str,
) -> None:
    if not cluster.has_namespaces:
        skip("namespaces can't be made, and a node that shares this host has no power of its own to lose")
    settings = {**LONG, "checkpointing_steps": 25, "dropout": 0.0}
    path, run = write_recipe("cut", **settings), tmp_path / "cut"
    job_id = cluster.submit(ONE_THREAD, f"--nodes={num_nodes}", FINETUNE, "--config", path, folder=tmp_path)
    wait_until(lambda: (run / "checkpoints" / "step_00000050").exists(), "two checkpoints", 240)
    assert cluster.job(job_id).nodes == ("node1" if num_nodes == 1 else "node[1-2]")
    cluster.cut_power(lost)
    try:
        wait_until(lambda: cluster.job(job_id).num_restarts == 1, "Slurm misses the node", 240)
        if num_nodes == 2:  # One node goes on without it.
            cluster.start_node(lost)
        job, log = cluster.wait(job_id), read_log(tmp_path, job_id)
    finally:
        cluster.start_node(lost)
    assert (job.state, job.exit_code, job.num_restarts) == ("COMPLETED", 0, 1), log
    assert job.nodes == ("node2" if num_nodes == 1 else "node[1-2]")
    assert re.search(r"checkpoints/step_\d+", log)
    _train_uninterrupted({**recipe, **settings, "output_dir": str(tmp_path / "whole")}, num_nodes)
    assert read_curve(run) == read_curve(tmp_path / "whole")
    wait_until(lambda: cluster.node_states() == ["idle", "idle"], "both nodes are back", 120)


def test_a_wrong_recipe_fails_at_once(cluster: Cluster, write_recipe: WriteRecipe, tmp_path: Path) -> None:
    started = time.monotonic()
    path = write_recipe(learning_rat=1)
    job_id = cluster.submit("--nodes=2", FINETUNE, "--config", path, folder=tmp_path)
    dependent = cluster.submit(
        "--dependency", f"afterok:{job_id}", "--kill-on-invalid-dep=yes", "--output=/dev/null", "--wrap", "true"
    )
    job, log = cluster.wait(job_id), (tmp_path / f"slurm-{job_id}.out").read_text(encoding="utf-8")
    assert time.monotonic() - started < 30
    assert (job.state, job.exit_code, job.num_restarts) == ("FAILED", 2, 0), log
    assert names(log, "learning_rat", "learning_rate")
    assert "Traceback" not in read_log(tmp_path, job_id)
    assert cluster.wait(dependent, seconds=30).state == "CANCELLED"

    for words, needed in (
        ([], "recipe"),
        (["--config"], "recipe"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--config", path, "--learning_rate"], "--learning_rate"),
    ):
        job_id = cluster.submit(FINETUNE, *words, folder=tmp_path)
        job, log = cluster.wait(job_id), read_log(tmp_path, job_id)
        assert (job.state, job.exit_code) == ("FAILED", 2), log
        assert names(log, needed)


def test_wrong_data_fails_on_all_nodes(
    cluster: Cluster, write_recipe: WriteRecipe, recipe: dict[str, Any], tmp_path: Path
) -> None:
    rows = Path(recipe["train_file"]).read_text(encoding="utf-8")
    (tmp_path / "bad.jsonl").write_text(rows + '{"text": "", "label": "tech"}\n', encoding="utf-8")
    path = write_recipe(train_file=str(tmp_path / "bad.jsonl"))
    job_id = cluster.submit("--nodes=2", FINETUNE, "--config", path, folder=tmp_path)
    # Four ranks import their packages: half a minute on two slow cores, and more beside other tests.
    job, log = cluster.wait(job_id, seconds=150), read_log(tmp_path, job_id)
    assert (job.state, job.exit_code, job.num_restarts) == ("FAILED", 2, 0), log
    assert "row 204" in (tmp_path / f"slurm-{job_id}.out").read_text(encoding="utf-8"), log
    assert not (tmp_path / "run").exists()


def test_two_jobs_on_the_same_nodes(
    cluster: Cluster, write_recipe: WriteRecipe, recipe: dict[str, Any], train: Train, tmp_path: Path
) -> None:
    jobs = {
        seed: cluster.submit(
            "--nodes=2", FINETUNE, "--config", write_recipe(f"seed_{seed}", seed=seed), folder=tmp_path
        )
        for seed in (1, 2)
    }
    wait_until(
        lambda: (
            [(cluster.job(job).state, cluster.job(job).nodes) for job in jobs.values()]
            == [("RUNNING", "node[1-2]")] * 2
        ),
        "both run at once",
        30,
    )
    for seed, job_id in jobs.items():
        assert cluster.wait(job_id).state == "COMPLETED", read_log(tmp_path, job_id)
        alone = train({**recipe, "seed": seed, "output_dir": str(tmp_path / f"alone_{seed}")})
        assert Run(0, "", "", tmp_path / f"seed_{seed}").losses == pytest.approx(alone.losses, rel=1e-5)


# Stands in for onecurve, where only what the batch script makes of an ending is looked at.
_STOPS = """\
touch waiting
until [ -e "$ONECURVE_STOP_FILE" ]; do sleep 0.1; done
echo '{"state": "preempted", "exit_code": 75, "step": 5}' > "$ONECURVE_STATUS_FILE"
rm -f waiting
exit 75
"""


@pytest.fixture
def submit_ending(cluster: Cluster, tmp_path: Path) -> Callable[..., str]:
    """Submit the batch script with a stand-in for onecurve: submit_ending("exit 3", "--no-requeue")."""

    def submit(script: str, *options: str) -> str:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        (folder / "onecurve").write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        (folder / "onecurve").chmod(0o755)
        path = {"PATH": f"{folder}{os.pathsep}{cluster.environment['PATH']}"}
        return cluster.submit(*options, FINETUNE, "--config", "x.yaml", environment=path, folder=tmp_path)

    return submit


@pytest.mark.parametrize(
    ("script", "exit_code"), [("exit 1", 1), ("exit 3", 3), ("exit 75", 75), ("exit 9", 1), ("kill -9 $$", 1)]
)
def test_a_failure_keeps_its_exit_code_and_is_not_queued_again(
    cluster: Cluster, submit_ending: Callable[..., str], tmp_path: Path, script: str, exit_code: int
) -> None:
    job_id = submit_ending(f"echo the last words; {script}")
    job, log = cluster.wait(job_id), (tmp_path / f"slurm-{job_id}.out").read_text(encoding="utf-8")
    assert (job.state, job.exit_code, job.num_restarts) == ("FAILED", exit_code, 0), log
    assert ("the last words" in log) == (exit_code != 75)
    assert not list(tmp_path.glob(".onecurve-job-*"))


def test_a_node_that_fails_alone_ends_the_others(
    cluster: Cluster, write_recipe: WriteRecipe, submit_ending: Callable[..., str], tmp_path: Path
) -> None:
    # The first waits for the second as it does for real: in a training that has not begun.
    real = f"PATH={cluster.environment['PATH']} exec onecurve run {write_recipe()} --num_processes 2"
    started = time.monotonic()
    job_id = submit_ending(
        f'if [ "$SLURM_NODEID" = 1 ]; then echo the GPU is lost; exit 2; fi; {real}', "--nodes=2", "--job-name=alone"
    )
    job = cluster.wait(job_id, seconds=120)
    log = (tmp_path / f"slurm-{job_id}.out").read_text(encoding="utf-8")
    assert (job.state, job.exit_code, job.num_restarts) == ("FAILED", 2, 0), log
    assert "the last lines of slurm-" in log
    assert "the GPU is lost" in log, "the log of the node that has failed"
    assert time.monotonic() - started < 90
    wait_until(lambda: not find_processes(str(tmp_path / "run.yaml")), "nothing of it is left", 60)
    assert not list(tmp_path.glob(".onecurve-job-*"))


def test_what_a_node_needs_reaches_it(cluster: Cluster, submit_ending: Callable[..., str], tmp_path: Path) -> None:
    # The test cluster binds nothing to cores; where Slurm does, a step without this variable gets one.
    tells = 'echo "cores $SLURM_CPUS_ON_NODE $SRUN_CPUS_PER_TASK"; echo "here $SLURM_JOB_ID"; echo "offline $HF_HUB_OFFLINE"'
    jobs = [submit_ending(tells, "--cpus-per-task=2"), submit_ending(tells, "--cpus-per-task=2", "--export=PATH")]
    for job_id in jobs:
        assert cluster.wait(job_id).state == "COMPLETED", read_log(tmp_path, job_id)
        told = (tmp_path / f"slurm-{job_id}-node0.out").read_text(encoding="utf-8")
        assert told == f"cores 2 2\nhere {job_id}\noffline 1\n"


def test_a_job_that_gets_nowhere_is_not_queued_for_ever(
    cluster: Cluster, submit_ending: Callable[..., str], tmp_path: Path
) -> None:
    job_id = submit_ending(_STOPS)
    for num_restarts in (0, 1, 2):
        wait_until(lambda: (tmp_path / "waiting").exists(), "it runs", 120)
        assert cluster.job(job_id).num_restarts == num_restarts
        cluster.run("scancel", "--batch", "--signal=USR1", job_id)
        wait_until(lambda: not (tmp_path / "waiting").exists(), "it has stopped", 60)
        if num_restarts == 0:  # As if the node had lost its power before it could count.
            count = tmp_path / f".onecurve-job-{job_id}" / "num_idle"
            wait_until(count.exists, "the count is written", 60)
            count.unlink()
    job, log = cluster.wait(job_id, "FAILED", seconds=60), read_log(tmp_path, job_id)
    assert (job.exit_code, job.num_restarts) == (75, 2), log
    assert names(log, "two starts")


def test_a_job_that_may_not_be_queued_again_says_so(
    cluster: Cluster, submit_ending: Callable[..., str], tmp_path: Path
) -> None:
    job_id = submit_ending(_STOPS, "--no-requeue")
    wait_until(lambda: (tmp_path / "waiting").exists(), "it runs", 120)
    cluster.run("scancel", "--batch", "--signal=USR1", job_id)
    job, log = cluster.wait(job_id, seconds=60), read_log(tmp_path, job_id)
    assert (job.state, job.exit_code, job.num_restarts) == ("FAILED", 75, 0), log
    assert "scontrol requeue: " in log, "what Slurm says of it"
    assert names(log, "queued", "submit")


def test_a_controller_that_refuses_at_first_is_asked_again(
    cluster: Cluster, submit_ending: Callable[..., str], tmp_path: Path
) -> None:
    job_id = submit_ending(_STOPS)
    scontrol, tries = tmp_path / "bin" / "scontrol", tmp_path / "tries"
    refuses = f'echo x >> "{tries}"; [ $(wc -l < "{tries}") -gt 2 ] || {{ echo "Unable to contact" >&2; exit 1; }}'
    scontrol.write_text(f'#!/bin/sh\n{refuses}\nexec {shutil.which("scontrol")} "$@"\n', encoding="utf-8")
    scontrol.chmod(0o755)
    wait_until(lambda: (tmp_path / "waiting").exists(), "it runs", 120)
    cluster.run("scancel", "--batch", "--signal=USR1", job_id)
    wait_until(lambda: cluster.job(job_id).num_restarts == 1, "queued again", 60)
    assert read_log(tmp_path, job_id).count("scontrol requeue: Unable to contact") == 2
    cluster.run("scancel", job_id)
    cluster.wait(job_id)
