"""environment.json names versions, revision and job, and no secrets."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

from onecurve.training.record.environment import describe_changes, describe_environment
from tests.conftest import ROOT
from tests.messages import names


def test_the_environment_names_versions_and_revision_and_no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "a-secret-value")
    environment = describe_environment({}, ["loss"])
    assert environment["packages"]["torch"] == torch.__version__
    assert environment["packages"]["safetensors"] != "not installed"
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert environment["git_revision"] == (head.stdout.strip() if head.returncode == 0 else None)
    assert "a-secret-value" not in json.dumps(environment)


def test_a_task_of_an_array_is_named_by_its_array(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    assert describe_environment({}, ["loss"])["slurm_job_id"] == "12"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert describe_environment({}, ["loss"])["slurm_job_id"] == "12_3", (
        "the number of the last task is that of the array"
    )


def test_without_git_there_is_no_revision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert describe_environment({}, ["loss"])["git_revision"] is None


def test_what_an_upgrade_changed_is_named() -> None:
    now = describe_environment({"device_name": "A100"}, ["loss"])
    assert describe_changes(now, now) is None
    assert describe_changes({}, now) is None
    before = {
        **now,
        "packages": {**now["packages"], "torch": "1.0", "gone": "3"},
        "topology": {"device_name": "H100"},
        "slurm_job_id": "7",
        "cpu_cores": 1000,
    }
    del before["packages"]["accelerate"]
    changes = describe_changes(before, now)
    assert changes is not None
    assert names(changes, f"torch 1.0 -> {now['packages']['torch']}", "gone 3 ->", "device H100 -> A100")
    assert names(changes, "accelerate", now["packages"]["accelerate"])
    assert changes.count("->") == 4
