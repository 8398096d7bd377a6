"""What is sent to Slurm, as text; what it answers is tested on a real one in tests/slurm."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onecurve.launcher.cluster.jobs import find_job_id, note_job
from onecurve.launcher.cluster.queue import QueueState, find_job, parse_queue_line, pick_task
from onecurve.launcher.cluster.request import Request
from onecurve.launcher.cluster.sbatch import check_folder, render_comparison, render_sweep, render_training
from onecurve.launcher.errors import UsageError
from tests.messages import names, naming

ROOT = Path("/project")
RUN = Path("/data/a run")
PRINTABLE = st.text(min_size=1).filter(str.isprintable)


def test_a_plain_job_leaves_the_script_as_it_is() -> None:
    words = render_training(ROOT, Request(recipe="r.yaml"), RUN).words
    assert words == (
        "sbatch",
        "--parsable",
        "--comment=onecurve /data/a run",
        "--nodes=1",
        "/project/slurm/finetune.sh",
        "--config=r.yaml",
    )


def test_all_that_is_asked_for() -> None:
    request = Request(
        recipe="r.yaml",
        overrides={"seed": "7"},
        num_nodes=2,
        gpus_per_node=4,
        time="12:00:00",
        partition="gpu",
        job_name="a name",
        dependency="afterok:12",
        options=("--account=us",),
        topology="fsdp",
        num_processes=6,
    )
    text = render_training(ROOT, request, RUN).to_shell()
    assert text == (
        "sbatch --parsable '--job-name=a name' '--comment=onecurve /data/a run' --nodes=2 "
        "--gpus-per-node=4 --cpus-per-task=16 --time=12:00:00 "
        "--partition=gpu --dependency=afterok:12 --kill-on-invalid-dep=yes --account=us "
        "/project/slurm/finetune.sh --config=r.yaml --topology=fsdp --num_processes=6 --seed=7"
    )


def test_a_sweep_and_its_comparison() -> None:
    options = ("--constraint=h100", "--account=us", "--time=99:00:00", "-qhigh", "--mem=200G")
    request = Request(
        recipe="r.yaml", overrides={"seed": "7"}, gpus_per_node=1, partition="gpu", dependency="afterok:12",
        options=options, num_processes=1, sweep=Path("s.yaml"), at_once=2,
    )  # fmt: skip
    array = render_sweep(ROOT, request, RUN, num_runs=4).to_shell()
    assert "--array=0-3%2 --nodes=1 --gpus-per-node=1" in array
    assert array.endswith("/project/slurm/sweep.sh --sweep=s.yaml --num_processes=1 --seed=7")
    comparison = render_comparison(ROOT, request, "55").to_shell()
    assert "--dependency=afterany:55" in comparison
    assert "--partition=gpu" in comparison
    assert "gpus" not in comparison, "a table needs no GPU"
    assert "--account=us -qhigh" in comparison
    assert not any(word in comparison for word in ("h100", "99:00:00", "200G"))
    assert comparison.endswith("/project/slurm/sweep.sh --sweep=s.yaml --seed=7")


@given(name=PRINTABLE, path=PRINTABLE, value=PRINTABLE)
def test_every_word_means_itself(name: str, path: str, value: str) -> None:
    submission = render_training(ROOT, Request(recipe=path, overrides={"output_dir": value}, job_name=name), RUN)
    assert submission.words[2] == f"--job-name={name}"
    assert submission.words[-2:] == (f"--config={path}", f"--output_dir={value}")
    assert tuple(shlex.split(submission.to_shell())) == submission.words, "also where a person pastes it into a shell"


@pytest.mark.parametrize("text", ["two\nlines", "\0", "a\tb", "\x1b[2J", "right\u202eleft"])
def test_control_characters_are_refused(text: str) -> None:
    for request in (
        Request(recipe="r", job_name=text),
        Request(recipe=text),
        Request(recipe="r", overrides={"output_dir": text}),
        Request(recipe="r", time=text),
    ):
        with pytest.raises(UsageError, match="control character"):
            render_training(ROOT, request, RUN)


def test_an_option_that_is_none_is_refused() -> None:
    with pytest.raises(UsageError, match=naming("sbatch")):
        render_training(ROOT, Request(recipe="r", options=("rm.sh",)), RUN)


@pytest.mark.parametrize("folder", ["/data/100%j", "/a\\b", "/a\nb"])
def test_a_folder_that_sbatch_reads_as_a_pattern_is_refused(folder: str) -> None:
    with pytest.raises(UsageError, match=naming("folder")):
        check_folder(Path(folder))
    check_folder(Path("/it's $(fine) *"))


def test_the_newest_job_of_a_run_directory(tmp_path: Path) -> None:
    assert find_job_id(tmp_path) is None
    environment = {"slurm_job_id": "9"}
    (tmp_path / "environment.json").write_text(json.dumps(environment), encoding="utf-8")
    assert find_job_id(tmp_path) == "9", "a training that was submitted by hand"
    note_job(tmp_path, "12_3")
    assert find_job_id(tmp_path) == "12_3", "submitted to go on, and not begun yet"
    environment = {"slurm_job_id": "104"}
    (tmp_path / "environment.json").write_text(json.dumps(environment), encoding="utf-8")
    assert find_job_id(tmp_path) == "104"
    for text in ("{", "[]", '{"slurm_job_id": null}', '{"slurm_job_id": "; rm"}'):
        (tmp_path / "environment.json").write_text(text, encoding="utf-8")
        assert find_job_id(tmp_path) == "12_3"


@pytest.mark.parametrize("target", ["runs/nowhere", "-1", "12_", "1;2", "\uff11\uff12"])
def test_what_is_no_job(target: str) -> None:
    assert find_job_id(target) is None


def test_a_line_of_squeue() -> None:
    line = f"{'RUNNING':<30}{'None':<80}{'2':<12}{'1-02:00:00':<24}{'gpu[1-2]':<400}"
    state = parse_queue_line("7", line)
    assert state == QueueState("7", "RUNNING", "None", 2, "gpu[1-2]", "1-02:00:00")
    assert names(state.describe(), "job 7", "RUNNING", "gpu[1-2]", "1-02:00:00", "2 times")
    waiting = QueueState("8", "PENDING", "Resources", 0, "", "2:00:00")
    assert names(waiting.describe(), "job 8", "PENDING", "Resources")
    assert not waiting.is_over
    assert QueueState("8", "OUT_OF_MEMORY", "None", 0, "n1", "0:00").is_over


def test_an_array_is_over_when_every_task_is() -> None:
    ended, failed = QueueState("7", "COMPLETED", "None", 0, "", ""), QueueState("7", "FAILED", "None", 0, "", "")
    waiting = QueueState("7", "PENDING", "Priority", 0, "", "")
    assert pick_task([ended, waiting, ended]) is waiting
    assert pick_task([ended, failed]).is_over


def test_without_slurm_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert find_job("7") is None
