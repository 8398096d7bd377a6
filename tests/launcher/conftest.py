"""A machine that is not this one: nvidia-smi as a script, and recipes that need no training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from onecurve.launcher.facts.gpus import Device
from onecurve.launcher.facts.machine import Machine
from onecurve.launcher.planning.devices import Cluster, parse_devices
from onecurve.launcher.planning.topology import build_topology
from onecurve.launcher.preflight import check_recipe
from onecurve.launcher.units import GIB
from onecurve.training.config import build_recipe
from tools.launches import LaunchServer, build_environment

ROOT = Path(__file__).parents[2]


def machine(num_gpus: int = 0, gib: float = 16, used: float = 0, capability: float = 9.0, driver: int = 580) -> Machine:
    """A machine with equal GPUs, or one without any."""
    devices = tuple(
        Device(index, "GPU", int(gib * GIB), int(used * GIB), capability, driver) for index in range(num_gpus)
    )
    return Machine("cuda" if devices else "cpu", devices, 8, int(gib * GIB))


def cluster(devices: str, num_nodes: int = 1, host_gib: float = 64) -> Cluster:
    """Nodes to plan for, at 40 % of the devices' peak."""
    return Cluster(devices=parse_devices(devices), num_nodes=num_nodes, host_bytes=int(host_gib * GIB), mfu=0.4)


def messages(recipe: dict[str, Any], on: Machine, topology: str = "cpu", num_processes: int | None = None) -> list[str]:
    """What `check` says of a recipe, each with its severity."""
    findings = check_recipe(build_recipe(recipe), build_topology(ROOT, on, topology, num_processes), on)
    return [f"{finding.severity}: {finding.message}" for finding in findings]


# Commands that start a training or something else that imports torch.
STARTERS = frozenset({"run", "resume", "predict", "merge", "check", "plan", "sweep", "fetch", "init"})

Onecurve = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def onecurve(launch_server: LaunchServer) -> Onecurve:
    """Run the command line in the project's folder: onecurve("check", ..., environment={...}).

    What it starts is forked by the launch server, which saves the imports; with is_real=True all are new processes.
    """

    def run(
        *words: object, environment: Mapping[str, str] | None = None, is_real: bool = False
    ) -> subprocess.CompletedProcess[str]:
        arguments = ["-m", "onecurve", *map(str, words)]
        seconds = 300  # Another training may share the machine.
        forked = build_environment(environment)
        if not is_real and words and words[0] in STARTERS and launch_server.serves(forked):
            return launch_server.run_script(arguments, forked, seconds)
        hidden = dict(os.environ)
        if environment and "PATH" in environment:  # It brings its own driver, whose GPUs are seen.
            hidden.pop("CUDA_VISIBLE_DEVICES")
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=ROOT,
            env={**hidden, **(environment or {})},
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )

    return run


@pytest.fixture
def fake_gpus(tmp_path: Path) -> Callable[..., dict[str, str]]:
    """An environment whose nvidia-smi lists GPUs: fake_gpus(8, "NVIDIA H100 80GB HBM3", 81559)."""

    def build(count: int, name: str = "NVIDIA H100 80GB HBM3", mib: int = 81559, used: int = 4) -> dict[str, str]:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        rows = "\n".join(f"{index}, GPU-{index}aaa, {name}, {mib}, {used}, 9.0, 580.65.06" for index in range(count))
        script = folder / "nvidia-smi"
        script.write_text(f"#!/bin/sh\ncat <<'END'\n{rows}\nEND\n", encoding="utf-8")
        script.chmod(0o755)
        return {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}

    return build


@pytest.fixture
def broken_driver(tmp_path: Path) -> dict[str, str]:
    """An environment whose nvidia-smi fails as it does where the driver is not loaded."""
    script = tmp_path / "broken" / "nvidia-smi"
    script.parent.mkdir()
    script.write_text('#!/bin/sh\necho "couldn\'t communicate with the NVIDIA driver"\nexit 9\n', encoding="utf-8")
    script.chmod(0o755)
    return {"PATH": f"{script.parent}{os.pathsep}{os.environ['PATH']}"}


@pytest.fixture
def recipe_file(recipe: dict[str, Any], tmp_path: Path) -> Path:
    """The small recipe as a file."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


@pytest.fixture
def write_run(tmp_path: Path) -> Callable[..., Path]:
    """A run directory as a training leaves it: write_run("a", num_steps=20, learning_rate=1e-3)."""

    def write(
        name: str, num_steps: int = 20, state: str = "finished", num_starts: int | None = None, **settings: Any
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        config = {"num_train_epochs": 2.0, "max_train_steps": None, "seed": 1, "output_dir": name, **settings}
        (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        topology = {"strategy": "DDP", "num_processes": 2, "device": "cpu"}
        environment = {"topology": topology} | ({"num_starts": num_starts} if num_starts is not None else {})
        (folder / "environment.json").write_text(json.dumps(environment), encoding="utf-8")
        status = {"state": state, "exit_code": 0, "step": num_steps, "message": ""}
        (folder / "status.json").write_text(json.dumps(status), encoding="utf-8")
        lines: list[dict[str, Any]] = [
            {
                "event": "train", "step": step, "epoch": step / 20, "loss": 2.0 / step, "learning_rate": 1e-3,
                "grad_norm": 1.0, "examples": 8, "tokens": 100, "tokens_per_second": 50.0, "padding": 0.1,
                "peak_memory_bytes": 2**30 + step,
            }
            for step in range(1, num_steps + 1)
        ]  # fmt: skip
        lines.append({"event": "eval", "step": num_steps // 2, "eval_loss": 0.4, "eval_accuracy": 0.9})
        lines.append({"event": "eval", "step": num_steps, "eval_loss": 0.5, "eval_accuracy": 0.8})
        text = "".join(json.dumps(line) + "\n" for line in lines) + '{"event": "train", "st'
        (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
        return folder

    return write
