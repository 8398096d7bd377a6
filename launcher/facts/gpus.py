"""The GPUs of this machine that CUDA would number, found without torch; or why those that are here can't be used.

nvidia-smi is asked first. A container may lack it and still have the driver's library. What is neither (AMD's and Intel's
GPUs) is found by its own tool, so that nobody trains on a CPU beside it without knowing.
"""

from __future__ import annotations

import csv
import ctypes
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from onecurve.launcher.units import GIB, MIB

_NVIDIA_FIELDS = "index,uuid,name,memory.total,memory.used,compute_cap,driver_version,mig.mode.current"

# These share the host's memory, and nvidia-smi says [N/A] for theirs.
_UNIFIED_MEMORY = ("GB10", "THOR", "ORIN", "TEGRA", "XAVIER")

# (maker, command, what a line that names a GPU looks like)
_OTHER_TOOLS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("AMD", ("amd-smi", "list"), r"^GPU: \d+"),
    ("AMD", ("rocm-smi", "--showid"), r"^GPU\[\d+\]\s*:\s*(?:Device ID|GPU ID)"),
    ("Intel", ("xpu-smi", "discovery"), r"Device Name: "),
)


@dataclass(frozen=True)
class Device:
    """One accelerator.

    Attributes:
        used_bytes: in use at this moment, by any process.
        compute_capability: of an NVIDIA GPU; 0 if unknown.
        driver_version: the driver's branch, such as 580; 0 if unknown.
    """

    index: int
    name: str
    memory_bytes: int
    used_bytes: int = 0
    compute_capability: float = 0.0
    driver_version: int = 0


Found = tuple[tuple[Device, ...], str | None]
"""Devices, and why there are none although there are GPUs."""


def find_gpus(environment: Mapping[str, str], host_bytes: int, library: str = "libcuda.so.1") -> Found:
    """The GPUs that PyTorch would see.

    Args:
        host_bytes: memory of the host, which some GPUs share.
        library: of NVIDIA's driver.
    """
    if environment.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return (), None
    if shutil.which("nvidia-smi", path=environment.get("PATH")) is not None:
        return find_nvidia_devices(environment, host_bytes)
    devices, problem = ask_driver(library)
    if devices or problem is not None:
        return devices, problem
    return (), _find_other_gpus(environment)


def find_nvidia_devices(environment: Mapping[str, str], host_bytes: int) -> Found:
    """NVIDIA devices as nvidia-smi lists them, without those that CUDA_VISIBLE_DEVICES hides."""
    text, problem = _run(("nvidia-smi", f"--query-gpu={_NVIDIA_FIELDS}", "--format=csv,noheader,nounits"), environment)
    if problem is not None:
        return (), f"nvidia-smi is installed but fails ({problem})"
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    instances = None
    if "MIG-" in (visible or "") or re.search(r",\s*Enabled\s*$", text, re.MULTILINE):
        instances, problem = _run(("nvidia-smi", "-L"), environment)
        if problem is not None:
            return (), f"nvidia-smi -L, which lists the parts of a GPU, fails ({problem})"
    devices = parse_nvidia_devices(text, visible, host_bytes, instances)
    if devices or not text.strip() or "No devices were found" in text:
        return devices, None
    shown = (
        "its output names no GPU that can be used" if visible is None else f"CUDA_VISIBLE_DEVICES={visible} names none"
    )
    return (), f"nvidia-smi lists {len(text.splitlines())} GPUs, but {shown}"


def _run(command: Sequence[str], environment: Mapping[str, str]) -> tuple[str, str | None]:
    """What a program prints, and why it failed, if it did."""
    try:
        result = subprocess.run(
            list(command), capture_output=True, text=True, timeout=30, check=False, env=dict(environment)
        )
    except subprocess.TimeoutExpired:
        return "", "no answer within 30 seconds"
    except OSError as error:
        return "", f"it can't be started: {error.strerror}"
    if result.returncode != 0:
        said = " ".join(f"{result.stdout} {result.stderr}".split())
        return "", f"exit code {result.returncode}" + (f": {said[:200]}" if said else "")
    return result.stdout, None


def parse_nvidia_devices(
    text: str, visible: str | None, host_bytes: int = 0, instances: str | None = None
) -> tuple[Device, ...]:
    """Devices from nvidia-smi's CSV, in the order in which CUDA numbers the visible ones.

    Args:
        visible: the value of CUDA_VISIBLE_DEVICES.
        host_bytes: the memory of GPUs that share the host's.
        instances: the output of `nvidia-smi -L`, if a GPU is split by MIG. CUDA uses one part of it, never the whole.
    """
    by_name: dict[str, Device] = {}
    for row in csv.reader(text.splitlines(), skipinitialspace=True):
        if len(row) < 7:
            continue
        index, uuid, name, total, used, capability, driver, *mig = (field.strip() for field in row)
        shares_memory = any(word in name.upper() for word in _UNIFIED_MEMORY)
        if not index.isdigit() or not (total.isdigit() or shares_memory):
            continue  # "[N/A]": a device that is lost.
        device = Device(
            int(index),
            name,
            int(total) * MIB if total.isdigit() else host_bytes,
            int(used) * MIB if used.isdigit() else 0,
            _to_float(capability),
            int(_to_float(driver.split(".")[0])),
        )
        by_name[index] = by_name[uuid] = device
        if mig == ["Enabled"]:
            by_name.pop(uuid)
            by_name.pop(index)
            parts = _parse_instances(instances or "", device)
            by_name.update(parts)
            if parts:  # Without a name CUDA takes the first part, as it does for the GPU's number.
                by_name[index] = next(iter(parts.values()))
    numbered = tuple(device for name, device in by_name.items() if name.isdigit())
    if visible is None:
        return numbered if not any("MIG" in device.name for device in numbered) else numbered[:1]
    chosen = []
    for word in (word.strip() for word in visible.split(",")):
        match = by_name.get(word) or next((by_name[name] for name in by_name if word and name.startswith(word)), None)
        if match is None:
            break  # CUDA ignores everything after the first name that it does not know.
        chosen.append(match)
    return tuple(chosen)


def _parse_instances(text: str, whole: Device) -> dict[str, Device]:
    """The parts of a GPU by their names, from lines such as "  MIG 1g.10gb     Device  0: (UUID: MIG-...)"."""
    parts = {}
    index = None
    for line in text.splitlines():
        if match := re.match(r"GPU (\d+):", line):
            index = int(match[1])
        match = re.match(r"\s+MIG (\S*?(\d+)gb\S*)\s+Device\s+\d+: \(UUID: (MIG-[^)]+)\)", line)
        if match and index == whole.index:
            memory = min(int(match[2]) * GIB, whole.memory_bytes)
            name = f"{whole.name} MIG {match[1]}"
            parts[match[3]] = Device(index, name, memory, 0, whole.compute_capability, whole.driver_version)
    return parts


def _to_float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


def ask_driver(library: str) -> Found:
    """NVIDIA devices as the driver's own library lists them, which knows CUDA_VISIBLE_DEVICES itself.

    Its functions: docs.nvidia.com/cuda/cuda-driver-api, "Initialization" and "Device Management".
    """
    try:
        driver = ctypes.CDLL(library)
    except OSError:
        return (), None
    code = driver.cuInit(0)
    if code == 100:  # CUDA_ERROR_NO_DEVICE
        return (), None
    count = ctypes.c_int()
    if code or driver.cuDeviceGetCount(ctypes.byref(count)):
        return (), f"NVIDIA's driver is installed but does not start (cuInit returns {code})"
    devices = []
    for index in range(count.value):
        handle, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()
        driver.cuDeviceGet(ctypes.byref(handle), index)
        driver.cuDeviceGetName(name, len(name), handle)
        driver.cuDeviceTotalMem_v2(ctypes.byref(memory), handle)
        for attribute, number in ((75, major), (76, minor)):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
            driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, handle)
        capability = major.value + minor.value / 10
        devices.append(Device(index, name.value.decode(errors="replace"), memory.value, 0, capability))
    return tuple(devices), None


def _find_other_gpus(environment: Mapping[str, str]) -> str | None:
    """Which GPUs of another maker are here; None if there are none."""
    for maker, command, line in _OTHER_TOOLS:
        if shutil.which(command[0], path=environment.get("PATH")) is None:
            continue
        text, problem = _run(command, environment)
        if problem is not None:
            return f"{command[0]} is installed but fails ({problem})"
        count = len(re.findall(line, text, re.MULTILINE))
        if count:
            return (
                f"{command[0]} lists {count} {maker} GPU{'s' * (count != 1)}, which this launcher can't choose for yet"
            )
    return None
