"""The variables of a launch: what must be set before Python starts, and the device that ranks must find."""

from __future__ import annotations

from dataclasses import replace

import pytest

from onecurve.launcher.launching.command import build_command
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
    for name in ("CUDA_DEVICE_ORDER", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)


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
