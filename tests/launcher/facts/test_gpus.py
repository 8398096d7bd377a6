"""Which GPUs are found, and which can't be used; with the output of tools that are not here."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from onecurve.launcher.facts.gpus import ask_driver, find_gpus, parse_nvidia_devices
from onecurve.launcher.facts.machine import detect_machine
from onecurve.launcher.units import GIB
from tests.launcher.conftest import Onecurve
from tests.messages import names

TWO = "0, GPU-aa, NVIDIA A100-SXM4-80GB, 81920, 0, 8.0, 550.54.15\n1, GPU-bb, NVIDIA A100-SXM4-80GB, 81920, 900, 8.0, 550.54.15\n"


@pytest.mark.parametrize(
    ("visible", "expected"),
    [(None, [0, 1]), ("1,0", [1, 0]), ("GPU-bb", [1]), ("GPU-b", [1]), ("", []), ("0,7,1", [0]), ("-1", [])],
)
def test_visible_devices_are_cudas(visible: str | None, expected: list[int]) -> None:
    assert [device.index for device in parse_nvidia_devices(TWO, visible)] == expected


def test_a_lost_device_is_left_out() -> None:
    assert len(parse_nvidia_devices(TWO + "2, GPU-cc, NVIDIA A100, [N/A], [N/A], 8.0, 550\ngarbage\n", None)) == 2


SPLIT = """0, GPU-aa, NVIDIA H100 80GB HBM3, 81559, 4, 9.0, 580.65.06, Enabled
1, GPU-bb, NVIDIA H100 80GB HBM3, 81559, 4, 9.0, 580.65.06, Disabled
"""
INSTANCES = """GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-aa)
  MIG 3g.40gb     Device  0: (UUID: MIG-11111111-aaaa)
  MIG 1g.10gb     Device  1: (UUID: MIG-22222222-bbbb)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-bb)
"""


@pytest.mark.parametrize(
    ("visible", "gib"),
    [
        ("MIG-22222222-bbbb", [10]),
        ("MIG-2222", [10]),
        ("0", [40]),
        ("GPU-bb", [80]),
        (None, [40]),  # CUDA uses a single part.
    ],
)
def test_a_part_of_a_gpu_has_its_own_memory(visible: str | None, gib: list[int]) -> None:
    found = parse_nvidia_devices(SPLIT, visible, instances=INSTANCES)
    assert [round(device.memory_bytes / GIB) for device in found] == gib


def test_a_gpu_that_shares_the_hosts_memory_has_that_much() -> None:
    row = "0, GPU-aa, NVIDIA GB10, [N/A], [N/A], 12.1, 580.95.05, [N/A]"
    (found,) = parse_nvidia_devices(row, None, host_bytes=120 * GIB)
    assert (found.memory_bytes, found.used_bytes, found.compute_capability) == (120 * GIB, 0, 12.1)


def write_tool(folder: Path, name: str, output: str, code: int = 0) -> dict[str, str]:
    """An environment with one tool, and what a script needs."""
    script = folder / name
    script.write_text(f"#!/bin/sh\n/bin/cat <<'END'\n{output}END\nexit {code}\n")
    script.chmod(0o755)
    return {"PATH": str(folder)}


@pytest.mark.parametrize(
    ("output", "visible", "word"),
    [
        (TWO, "GPU-zz", "GPU-zz"),
        ("0, GPU-aa, NVIDIA A100, [GPU is lost], [GPU is lost], [N/A], 550, [N/A]\n", None, "lists 1 GPUs"),
    ],
)
def test_gpus_that_cannot_be_used_are_a_problem(tmp_path: Path, output: str, visible: str | None, word: str) -> None:
    environment = write_tool(tmp_path, "nvidia-smi", output)
    if visible is not None:
        environment["CUDA_VISIBLE_DEVICES"] = visible
    machine = detect_machine(environment)
    assert machine.kind == "cpu"
    assert names(machine.driver_problem, "nvidia-smi", word)


def test_no_row_is_no_gpu(tmp_path: Path) -> None:
    assert find_gpus(write_tool(tmp_path, "nvidia-smi", "No devices were found\n"), 0) == ((), None)


AMD = """GPU: 0
    BDF: 0000:05:00.0
    UUID: 8eff74b5-0000-1000-8000
GPU: 1
    BDF: 0000:25:00.0
"""
ROCM = """============================ ROCm System Management Interface ============================
GPU[0]		: Device Name: 		AMD Instinct MI300X
GPU[0]		: Device ID: 		0x74a1
GPU[1]		: Device Name: 		AMD Instinct MI300X
GPU[1]		: Device ID: 		0x74a1
"""
INTEL = """+-----------+------------------------------------------------------------------------------+
| Device ID | Device Information                                                           |
+-----------+------------------------------------------------------------------------------+
| 0         | Device Name: Intel(R) Data Center GPU Max 1550                               |
+-----------+------------------------------------------------------------------------------+
"""


@pytest.mark.parametrize(
    ("tool", "output", "count", "maker"),
    [("amd-smi", AMD, 2, "AMD"), ("rocm-smi", ROCM, 2, "AMD"), ("xpu-smi", INTEL, 1, "Intel")],
)
def test_nobody_trains_on_the_cpu_beside_another_makers_gpus(
    tmp_path: Path, onecurve: Onecurve, recipe_file: Path, tool: str, output: str, count: int, maker: str
) -> None:
    folder = tmp_path / "tools"
    folder.mkdir()
    environment = write_tool(folder, tool, output)
    devices, problem = find_gpus(environment, 0, library="none.so")
    assert devices == ()
    assert names(problem, tool, f"{count} {maker}")
    if tool != "rocm-smi":
        return
    environment = {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    ran = onecurve("run", recipe_file, "--dry-run", environment=environment)
    assert ran.returncode == 2
    assert names(ran.stderr, "rocm-smi", "--topology")
    assert onecurve("run", recipe_file, "--dry-run", "--topology", "cpu", environment=environment).returncode == 0


DRIVER = """
#include <string.h>
int cuInit(unsigned flags) { return CODE; }
int cuDeviceGetCount(int *count) { *count = 2; return 0; }
int cuDeviceGet(int *device, int index) { *device = index + 7; return 0; }
int cuDeviceGetName(char *name, int length, int device) { strcpy(name, device == 7 ? "First" : "Second"); return 0; }
int cuDeviceTotalMem_v2(unsigned long *bytes, int device) { *bytes = 24ul << 30; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = attribute == 75 ? 8 : 6; return 0; }
"""


@pytest.fixture
def build_driver(tmp_path: Path) -> str:
    if shutil.which("gcc") is None:
        pytest.skip("no C compiler")
    return str(tmp_path / "driver.so")


@pytest.mark.parametrize(("code", "is_problem"), [(0, False), (100, False), (999, True)])
def test_without_nvidia_smi_the_drivers_library_is_asked(build_driver: str, code: int, is_problem: bool) -> None:
    source = Path(build_driver).with_suffix(".c")
    source.write_text(DRIVER.replace("CODE", str(code)))
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", build_driver, str(source)], check=True)
    devices, problem = find_gpus({"PATH": "/nonexistent"}, 0, build_driver)
    assert (problem is not None) == is_problem
    found = [(device.index, device.name, device.memory_bytes, device.compute_capability) for device in devices]
    assert found == ([(0, "First", 24 * GIB, 8.6), (1, "Second", 24 * GIB, 8.6)] if code == 0 else [])


def test_without_a_driver_there_is_no_nvidia_gpu() -> None:
    assert ask_driver("no_such_library.so") == ((), None)
