"""Job files for SkyPilot and Kubernetes: what their publishers' schemas take, and what a node's script does."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from kubeflow_trainer_api import models

from onecurve.launcher.cli import run_command_line
from onecurve.launcher.cluster.elsewhere import Place
from onecurve.launcher.cluster.job_file import Platform, write_job_file
from onecurve.launcher.cluster.request import Request
from onecurve.launcher.errors import UsageError
from tests.conftest import ROOT
from tests.launcher.cluster.platforms import name_variables, read_documents, start_node, write_onecurve
from tests.messages import names, naming

RECIPE = "training/recipes/demo.yaml"
# Extracted from SkyPilot's package, as "source" in it says.
SCHEMAS = json.loads((Path(__file__).parent / "skypilot_schema.json").read_text(encoding="utf-8"))
HOSTILE = "a 'b' \"c\" $HOME $(id) $$ `id` %j ü"


@pytest.fixture(autouse=True)
def _in_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def render(platform: Platform, *, volume: str = "runs", mount: str = "/onecurve", **request: Any) -> str:
    image = request.pop("image", "registry/onecurve:1" if platform == "kubernetes" else None)
    place = Place(volume=volume, mount=mount, gpu=request.pop("gpu", None), image=image)
    overrides = {"checkpointing_steps": "5", **request.pop("overrides", {})}
    asked = Request(recipe=request.pop("recipe", RECIPE), overrides=overrides, **request)
    return write_job_file(ROOT, platform, asked, place, None, True, print).text


REQUESTS: list[dict[str, Any]] = [
    {},
    {"num_nodes": 2, "gpus_per_node": 4, "gpu": "H100", "cpus_per_node": 32, "job_name": "news-1"},
    {"image": "registry/onecurve:1", "overrides": {"learning_rate": "3e-5"}},
    {"volume": "s3://bucket/runs"},
]


@pytest.mark.parametrize("request_", REQUESTS, ids=str)
def test_skypilot_takes_the_file(request_: dict[str, Any]) -> None:
    [task] = read_documents(render("skypilot", **request_))
    jsonschema.validate(task, SCHEMAS["task"])
    jsonschema.validate(task["resources"], SCHEMAS["resources"])
    for mount in task.get("file_mounts", {}).values():
        jsonschema.validate(mount, SCHEMAS["storage"])
    where = task.get("file_mounts") or task["volumes"]
    assert where == {
        "/onecurve": {"source": "s3://bucket/runs", "mode": "MOUNT_CACHED"} if "volume" in request_ else "runs"
    }
    assert "--output_dir /onecurve/runs/demo" in task["run"], "the project's folder does not outlive a node"
    assert task["resources"]["job_recovery"] == {"recover_on_exit_codes": [75]}


def check_object(content: dict[str, Any], model: Any) -> None:
    """The published model takes it, and knows every key: what it does not know, it would drop."""
    assert model.from_dict(content).to_dict() == content


@pytest.mark.parametrize("request_", [REQUESTS[0], {**REQUESTS[1], "gpu": None}, REQUESTS[2]], ids=str)
def test_kubeflow_takes_the_file(request_: dict[str, Any]) -> None:
    runtime, job = read_documents(render("kubernetes", **request_))
    check_object(runtime, models.TrainerV1alpha1TrainingRuntime)
    check_object(job, models.TrainerV1alpha1TrainJob)
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"] == job["metadata"]["name"]
    [replicated] = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    batch = replicated["template"]["spec"]
    # Bad input, a diverged training and a person's stop would end the same way again; all else starts again.
    [rule] = batch["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["operator"]) == ("FailJob", "In")
    assert rule["onExitCodes"]["values"] == [2, 3, 76]
    pod = batch["template"]["spec"]
    assert (pod["restartPolicy"], batch["backoffLimit"]) == ("Never", 0), "the JobSet starts all pods again together"
    assert pod["terminationGracePeriodSeconds"] >= 60
    trainer = job["spec"]["trainer"]
    assert trainer["numNodes"] == request_.get("num_nodes", 1)
    assert trainer["resourcesPerNode"]["limits"].get("nvidia.com/gpu") == (
        "4" if request_.get("gpus_per_node") else None
    )


@pytest.mark.parametrize("platform", ["skypilot", "kubernetes"])
def test_every_word_reaches_the_node_as_it_is(platform: Platform, tmp_path: Path) -> None:
    text = render(
        platform,
        mount=f"{tmp_path}/a b",
        overrides={"label_column": HOSTILE, "text_column": "--x"},
        topology="multi_cpu",
    )
    path = write_onecurve(tmp_path / "bin", f'printf "%s\\n" "$@" >{tmp_path}/words; env >{tmp_path}/environment')
    variables = {**name_variables(platform, 1, 2), "id": "expanded"}
    assert start_node(platform, text, variables, path, tmp_path / "output").wait(20) == 0
    words = (tmp_path / "words").read_text(encoding="utf-8").splitlines()
    run = ["--output_dir", f"{tmp_path}/a b/runs/demo"] if platform == "skypilot" else []
    assert words == [
        "run", RECIPE, "--topology=multi_cpu", "--checkpointing_steps", "5", "--label_column", HOSTILE, "--text_column=--x",
        *run,
    ]  # fmt: skip
    environment = (tmp_path / "environment").read_text(encoding="utf-8").splitlines()
    for name, value in {"NUM_NODES": "2", "NODE_RANK": "1", "HEAD_ADDRESS": "127.0.0.1", "PORT": "29400"}.items():
        assert f"ONECURVE_{name}={value}" in environment
    assert f"ONECURVE_STOP_FILE={tmp_path}/a b/.onecurve-onecurve/STOP" in environment
    assert not [line for line in environment if line.startswith("PET_")], "torchrun would read them too"


# What the training ends with, whether the platform asked for a stop, and what the platform gets.
ENDINGS = [
    (0, False, 0),
    (75, True, 75),
    (75, False, 76),
    (2, False, 2),
    (3, False, 3),
    (127, False, 2),
    (137, True, 1),
]


@pytest.mark.parametrize(("code", "is_ended", "expected"), ENDINGS)
def test_exit_codes(code: int, is_ended: bool, expected: int, tmp_path: Path) -> None:
    touch = 'touch "$ONECURVE_STOP_FILE"; ' if is_ended else ""
    path = write_onecurve(tmp_path / "bin", f"{touch}exit {code}")
    text = render("kubernetes", mount=str(tmp_path))
    assert start_node("kubernetes", text, name_variables("kubernetes"), path, tmp_path / "output").wait(20) == expected
    assert (tmp_path / ".onecurve-onecurve").exists() == (expected != 0)


def test_a_signal_reaches_the_training(tmp_path: Path) -> None:
    """The shell is the container's first process: without a handler the kernel would drop the signal."""
    started = tmp_path / "started"
    script = f"trap 'touch \"$ONECURVE_STOP_FILE\"; exit 75' TERM; mkfifo {started}; echo >{started}; while :; do sleep 0.1; done"
    path = write_onecurve(tmp_path / "bin", script)
    text = render("kubernetes", mount=str(tmp_path))
    node = start_node("kubernetes", text, name_variables("kubernetes"), path, tmp_path / "output")
    subprocess.run(["bash", "-c", f"until [ -p {started} ]; do :; done; cat {started}"], check=True, timeout=20)
    node.send_signal(signal.SIGTERM)
    assert node.wait(20) == 75


WRONG: list[tuple[Platform, dict[str, Any], tuple[str, ...]]] = [
    ("skypilot", {"gpus_per_node": 4}, ("--gpu",)),
    ("skypilot", {"volume": "s3://b", "num_nodes": 2}, ("--volume", "s3://b", "--nodes")),
    ("skypilot", {"time": "1:00:00", "partition": "p"}, ("--time", "--partition")),
    ("skypilot", {"job_name": "A job"}, ("--job-name", "'A job'")),
    ("skypilot", {"recipe": str(ROOT / RECIPE)}, (str(ROOT / RECIPE),)),
    ("skypilot", {"mount": "relative"}, ("--mount", "relative")),
    ("kubernetes", {"image": None}, ("--image",)),
    ("kubernetes", {"volume": "s3://b"}, ("--volume", "s3://b")),
    ("kubernetes", {"gpu": "H100"}, ("--gpu",)),
    ("kubernetes", {"overrides": {"label_column": "a\nb"}}, ("'a\\nb'",)),
]


@pytest.mark.parametrize(("platform", "request_", "named"), WRONG, ids=str)
def test_what_a_platform_does_not_have_is_refused(
    platform: Platform, request_: dict[str, Any], named: tuple[str, ...]
) -> None:
    with pytest.raises(UsageError, match=naming(*named)):
        render(platform, **request_)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a job.yaml"
    words = ["submit", RECIPE, "--to", "skypilot", "--volume", "runs", "--output", str(path)]
    assert run_command_line([*words, "--dry-run"]) == 0
    shown = capsys.readouterr()
    assert not path.exists()
    assert names(shown.err, "checkpointing_steps"), "a lost machine would cost everything"
    assert run_command_line(words) == 0
    assert capsys.readouterr().out == f"sky jobs launch '{path}'\n"
    assert path.read_text(encoding="utf-8") == shown.out
    # A file that somebody has edited is kept.
    path.write_text("mine", encoding="utf-8")
    assert run_command_line([*words, "--learning_rate", "1e-5"]) == 2
    assert names(capsys.readouterr().err, "a job.yaml", "--output")
    assert path.read_text(encoding="utf-8") == "mine"
    assert run_command_line(["submit", RECIPE, "--to", "skypilot"]) == 2
    assert names(capsys.readouterr().err, "--volume")
    assert run_command_line(["submit", RECIPE, "--volume", "runs", "--gpu", "H100"]) == 2
    assert names(capsys.readouterr().err, "--volume", "--gpu", "--to")
