"""World size, ports, affinity, variables of another launch."""

from __future__ import annotations

import dataclasses
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from onecurve.launcher.facts.machine import JobNode
from onecurve.launcher.planning.topology import build_topology
from onecurve.launcher.preflight import devices
from onecurve.launcher.preflight.devices import check_affinity, check_launch, check_port, check_processes
from onecurve.training.config import build_recipe
from tests.launcher.conftest import ROOT, machine, messages
from tests.messages import names


def _listen(port: int) -> socket.socket:
    taken = socket.socket()
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    taken.bind(("127.0.0.1", port))
    taken.listen()
    return taken


def test_memory_disk_and_devices(recipe: dict[str, Any], demo: Path) -> None:
    large = {
        **recipe, "model_name_or_path": str(demo / "model"), "per_device_batch_size": 512, "train_batch_size": 512,
        "max_length": 512, "mixed_precision": "bf16",
    }  # fmt: skip
    told = messages(large, machine(2, gib=8, used=4, capability=7.5), "multi_gpu")
    assert any("no bf16" in line for line in told)
    assert sum(names(line, "nvidia-smi") for line in told) == 2
    assert any(names(line, "per_device_batch_size") for line in told)


def test_a_start_that_the_host_has_no_room_for_is_told(recipe: dict[str, Any], demo: Path) -> None:
    """The demo's model has 91 MB in float32."""
    settings = {**recipe, "model_name_or_path": str(demo / "model")}
    word = "whole model each"
    assert any(names(line, word) for line in messages(settings, machine(8, gib=0.6), "multi_gpu"))
    assert not any(names(line, word) for line in messages(settings, machine(8, gib=1), "multi_gpu"))


def test_float32_on_a_gpu_with_bf16_is_told(recipe: dict[str, Any]) -> None:
    def is_told(**settings: Any) -> bool:
        capability = settings.pop("capability", 8.0)
        topology = settings.pop("topology", "single_gpu")
        found = machine(1, capability=capability)
        return any(names(line, "float32", "bf16") for line in messages({**recipe, **settings}, found, topology))

    assert is_told()
    assert not is_told(mixed_precision="bf16")
    assert not is_told(capability=7.5), "it has no bf16"
    assert not is_told(topology="cpu")


def test_one_process_does_not_inherit_a_world(recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("MASTER_ADDR", "elsewhere")
    told = messages(recipe, machine())
    assert len(told) == 1
    assert names(told[0], "$WORLD_SIZE", "4", "$MASTER_ADDR", "elsewhere")
    assert messages(recipe, machine(), "multi_cpu") == [], "accelerate sets them for several processes"
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert messages(recipe, machine()) == [], "a world of one is what was meant"


def test_nodes_share_the_processes_evenly(recipe: dict[str, Any]) -> None:
    step = JobNode("12345", 2, 0, "localhost", is_batch_shell=False)
    node = dataclasses.replace(machine(4), node=step)
    topology = build_topology(ROOT, node, "multi_node", 7)
    told = [finding.message for finding in check_processes(build_recipe(recipe), topology, node)]
    assert any(names(line, "7 processes", "2 nodes") for line in told)
    with _listen(22345):
        assert any("port 22345" in finding.message for finding in check_launch(topology, node))


def test_a_yaml_for_several_machines_on_one(recipe: dict[str, Any]) -> None:
    assert any(names(line, "2 machines") for line in messages(recipe, machine(), "multi_node", 2))


def test_more_processes_than_cores(recipe: dict[str, Any]) -> None:
    assert any(names(line, "9 processes", "8 cores") for line in messages(recipe, machine(), "multi_cpu", 9))


def test_a_taken_port_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with _listen(0) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(devices, "DEFAULT_PORT", port)
        assert names(check_port()[0].message, f"port {port}")
    assert check_port() == []


def test_a_process_tied_to_few_cores_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_affinity(machine()) == []
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert names(check_affinity(machine())[0].message, "8 of 64")


def test_variables_that_overrule_a_recipe_are_told(recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert any("unset ACCELERATE_GRADIENT_ACCUMULATION_STEPS" in line for line in messages(recipe, machine()))
