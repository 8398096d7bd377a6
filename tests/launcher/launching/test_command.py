"""The variables of a launch: what must be set before Python starts, and the device that ranks must find."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from onecurve.launcher.facts import numa
from onecurve.launcher.launching.command import BIND_TO_NODES, build_command
from onecurve.launcher.planning.topology import build_topology
from tests.launcher.conftest import ROOT, machine


def read_environment(num_gpus: int, topology: str, kind: str | None = None) -> dict[str, str]:
    found = machine(num_gpus)
    found = found if kind is None else replace(found, kind=kind)  # type: ignore[arg-type]
    command = build_command(found, build_topology(ROOT, found, topology, None), ROOT / "training" / "run.py", [])
    assert all(name in command.to_shell() for name in command.environment), "it is printed"
    return dict(command.environment)


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("CUDA_DEVICE_ORDER", "CUDA_VISIBLE_DEVICES", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    for name in (*names, "ACCELERATE_CPU_AFFINITY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with two memory nodes, all of whose cores are granted, and with NVIDIA's library."""
    for number in range(2):
        (tmp_path / f"node{number}").mkdir()
    monkeypatch.setattr(numa, "_NODES", tmp_path)
    monkeypatch.setattr(numa, "find_spec", lambda name: name == "pynvml" or None)
    monkeypatch.setattr(numa, "has_all_cores", lambda: True)
    return tmp_path


@pytest.mark.parametrize(
    ("variables", "num_gpus", "topology", "expected"),
    [
        ({}, 2, "multi_gpu", "1"),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2"}, 2, "multi_gpu", "1"),
        # accelerate would take the cores near other GPUs.
        ({"CUDA_VISIBLE_DEVICES": "2,3"}, 2, "multi_gpu", None),
        ({"CUDA_DEVICE_ORDER": "FASTEST_FIRST"}, 2, "multi_gpu", None),
        # One process uses the cores of both nodes.
        ({}, 1, "single_gpu", None),
        ({}, 2, "multi_cpu", None),
        ({"ACCELERATE_CPU_AFFINITY": "0"}, 2, "multi_gpu", None),
    ],
)
def test_processes_are_bound_to_the_cores_near_their_gpus(
    two_nodes: Path,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    num_gpus: int,
    topology: str,
    expected: str | None,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert read_environment(num_gpus, topology).get("ACCELERATE_CPU_AFFINITY") == expected


def test_nothing_is_bound_where_it_fails_or_takes_what_was_not_granted(
    two_nodes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(numa, "find_spec", lambda name: None)
        assert "ACCELERATE_CPU_AFFINITY" not in read_environment(2, "multi_gpu")
    with monkeypatch.context() as patch:
        patch.setattr(numa, "has_all_cores", lambda: False)
        assert "ACCELERATE_CPU_AFFINITY" not in read_environment(2, "multi_gpu")
    (two_nodes / "node1").rmdir()
    assert "ACCELERATE_CPU_AFFINITY" not in read_environment(2, "multi_gpu")


def test_accelerate_still_reads_that_variable() -> None:
    from accelerate import state

    assert BIND_TO_NODES in Path(state.__file__).read_text(encoding="utf-8")


def test_cuda_counts_devices_as_the_launcher_does_and_may_enlarge_segments() -> None:
    assert read_environment(2, "multi_gpu") == {
        "ONECURVE_DEVICE": "cuda",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    }


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_what_is_set_already_stays(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "max_split_size_mb:128")
    assert "PYTORCH_ALLOC_CONF" not in read_environment(1, "single_gpu")


@pytest.mark.parametrize(
    ("num_gpus", "topology"), [(0, "cpu"), (0, "fsdp"), (0, "deepspeed_zero3"), (2, "cpu"), (2, "multi_cpu")]
)
def test_a_training_on_the_cpu_expects_the_cpu(num_gpus: int, topology: str) -> None:
    environment = read_environment(num_gpus, topology)
    assert environment["ONECURVE_DEVICE"] == "cpu"
    assert "PYTORCH_ALLOC_CONF" not in environment
    assert ("DS_ACCELERATOR" in environment) == topology.startswith("deepspeed")


def test_an_apple_gpu_is_expected() -> None:
    assert read_environment(1, "single_gpu", "mps") == {"ONECURVE_DEVICE": "mps"}
