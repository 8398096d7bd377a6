"""Devices to plan for: named on the command line, or those of this machine."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from onecurve.launcher.errors import UsageError
from onecurve.launcher.facts.machine import Machine
from onecurve.launcher.units import GIB
from onecurve.training.product_rates import ProductRates

# Dense peak in 10^12 operations a second: (float32 as PyTorch runs it by default, bfloat16), and memory: the GB of its name,
# and the GiB that nvidia-smi shows, which are fewer where error correction takes its part. From the data sheets (NVIDIA:
# H200, H100 SXM, A100, L40S, L4, A10, V100, T4; AMD: MI300X, MI250X per die).
_KNOWN_DEVICES: dict[str, tuple[float, float, float, float]] = {
    "B200": (75, 2250, 180, 179),
    "H200": (67, 989, 141, 140.4),
    "H100": (67, 989, 80, 79.6),
    "A100": (19.5, 312, 80, 80),
    "L40S": (91.6, 362, 48, 45),
    "L4": (30.3, 121, 24, 22.5),
    "A10": (31.2, 125, 24, 22.5),
    "V100": (15.7, 125, 32, 32),
    "T4": (8.1, 65, 16, 15),
    "MI300X": (163.4, 1307, 192, 192),
    "MI250X": (23.9, 191, 64, 64),
}


@dataclass(frozen=True)
class DeviceKind:
    """Devices to plan for.

    Attributes:
        peak_float32, peak_half: dense peak in 10^12 operations a second; None if unknown: then the time is unknown too.
    """

    name: str
    count: int
    memory_bytes: int
    kind: Literal["cuda", "mps", "cpu"]
    peak_float32: float | None = None
    peak_half: float | None = None

    def teraflops(self, mixed_precision: str) -> float | None:
        """Dense peak at a precision, in 10^12 operations a second."""
        return self.peak_float32 if mixed_precision == "no" else self.peak_half


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Identical nodes to plan for.

    Attributes:
        devices: of one node.
        host_bytes: memory of one node, for what offloading moves there.
        mfu: share of the devices' peak that a training reaches (model FLOPs utilization).
    """

    devices: DeviceKind
    num_nodes: int
    host_bytes: int
    mfu: float


def parse_devices(text: str) -> DeviceKind:
    """Devices written as "8xH100-80GB", "A100-40GB", "2xL4" or "cpu-16GB".

    Raises:
        UsageError: it has another form, or an unknown device without its memory.
    """
    match = re.fullmatch(r"(?:(\d+)x)?([A-Za-z][A-Za-z0-9 ]*?)(?:-(\d+(?:\.\d+)?)GB)?", text)
    if match is None or match[1] == "0":
        raise UsageError(f"--devices {text}: expected COUNTxNAME-MEMORYGB, such as 8xH100-80GB")
    name, count = match[2], int(match[1] or 1)
    known = _KNOWN_DEVICES.get(name.upper())
    if known is None and match[3] is None:
        raise UsageError(
            f"--devices {text}: {name} is not a known device; add its memory, such as {count}x{name}-24GB. "
            f"Known: {', '.join(_KNOWN_DEVICES)}"
        )
    memory = float(match[3]) if match[3] else 0.0
    if known is not None and memory in (0.0, known[2]):
        memory = known[3]
    return DeviceKind(
        name=name,
        count=count,
        memory_bytes=int(memory * GIB),
        kind="cpu" if name.lower() == "cpu" else "cuda",
        peak_float32=known[0] if known else None,
        peak_half=known[1] if known else None,
    )


def describe_devices(machine: Machine, rates: ProductRates | None = None) -> DeviceKind:
    """This machine's devices, all taken to be as small as the smallest.

    Args:
        rates: what a CPU's matrix product was measured to reach on each core; no data sheet says it.
    """
    if not machine.devices:
        if rates is None:
            return DeviceKind("CPU", 1, machine.memory_bytes, "cpu")
        float32, bf16 = (rate * machine.num_cores / 1e12 for rate in (rates.float32, rates.bf16))
        return DeviceKind("CPU", 1, machine.memory_bytes, "cpu", float32, bf16)
    smallest = min(machine.devices, key=lambda device: device.memory_bytes)
    words = re.split(r"[\s-]+", smallest.name.upper())
    known = next((peaks for name, peaks in _KNOWN_DEVICES.items() if name in words), (None, None, 0.0, 0.0))
    return DeviceKind(
        smallest.name, len(machine.devices), smallest.memory_bytes, machine.kind, known[0], known[1]
    )  # fmt: skip
