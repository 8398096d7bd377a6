"""environment.json: which packages, machine, topology and revision a run was made with."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onecurve

_PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "evaluate",
    "tokenizers",
    "safetensors",
    "deepspeed",
)


def describe_environment(topology: dict[str, Any], main_metrics: Sequence[str]) -> dict[str, Any]:
    """The content of environment.json. It has no environment variables, which may hold secrets, except Slurm's job number."""
    versions = {
        "onecurve": onecurve.__version__
    }  # Of the code that runs: in a checkout another version may be installed.
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "packages": versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_cores": os.cpu_count(),
        "topology": topology,
        "main_metrics": list(main_metrics),
        "git_revision": _find_git_revision(),
        "slurm_job_id": _find_slurm_job(),
    }


def describe_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """What a resume finds changed since the last start, of all that may change results in the last digits; None if nothing is.

    Args:
        before: the content of the last start's environment.json; empty where there is none.
        now: of this start's.
    """
    if not before:
        return None
    old, new = _list_versions(before), _list_versions(now)
    changes = [
        f"{name} {old.get(name, 'not recorded')} -> {new.get(name, 'not recorded')}"
        for name in dict.fromkeys([*new, *old])
        if old.get(name) != new.get(name)
    ]
    return f"Changed since the last start: {', '.join(changes)}." if changes else None


def _list_versions(environment: Mapping[str, Any]) -> dict[str, str]:
    packages, topology = environment.get("packages"), environment.get("topology")
    found = dict(packages) if isinstance(packages, dict) else {}
    found |= {name: environment.get(name) for name in ("python", "platform")}
    found["code"] = str(environment.get("git_revision"))[:9]
    found["device"] = topology.get("device_name") if isinstance(topology, dict) else None
    return {name: str(value) for name, value in found.items()}


def _find_slurm_job() -> str | None:
    """The job's number as Slurm's commands take it. A task of an array is ARRAY_TASK: the number that Slurm gives the last
    task also names the whole array."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def _find_git_revision() -> str | None:
    try:
        result = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
