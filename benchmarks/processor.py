"""What kind of processor a benchmark runs on, and which precision it trains in there."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from onecurve.launcher.facts.product_rates import measure_product_rates

# From the fastest in bf16 to those without bf16 arithmetic: the flag of /proc/cpuinfo, and what ONEDNN_MAX_CPU_ISA calls a
# processor that has no more than this.
_FLAGS = {"AMX": "amx_bf16", "AVX-512 bf16": "avx512_bf16", "AVX-512": "avx512f", "AVX2": "avx2"}
_LIMITS = {"AVX512_CORE_BF16": "AVX-512 bf16", "AVX512_CORE": "AVX-512", "AVX512_CORE_VNNI": "AVX-512", "AVX2": "AVX2"}
OTHER = "Other processors"
KINDS = (*_FLAGS, OTHER)

# What a training by Onecurve on a CPU sets itself (training/models/allocator.py): other ways get it as variables.
GLIBC_ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
}

# What a benchmark's own processes read: the precision of Onecurve and of Trainer at its best.
PRECISION = "BENCHMARK_PRECISION"


def find_kind(flags: Collection[str], limit: str = "") -> str:
    """The section of RESULTS.md that a processor belongs to.

    Args:
        flags: of /proc/cpuinfo.
        limit: ONEDNN_MAX_CPU_ISA.
    """
    own = next((kind for kind, flag in _FLAGS.items() if flag in flags), OTHER)
    limited = _LIMITS.get(limit.upper(), own)
    return max(own, limited, key=KINDS.index)


def choose_precision(environment: Mapping[str, str] = os.environ) -> str:
    """The mixed_precision that this processor trains fastest in: bf16, or no where a product is slower in it."""
    if PRECISION in environment:
        return environment[PRECISION]
    rates = measure_product_rates()
    return "bf16" if rates is not None and rates.slowdown < 1 else "no"


def describe_machine() -> dict[str, Any]:
    """Where and with what this was measured."""
    found = {"model name": platform.processor(), "flags": ""}
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in found:
                found[name.strip()] = value.strip()
    flags, limit = found["flags"].split(), os.environ.get("ONEDNN_MAX_CPU_ISA", "")
    units = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    return {
        "processor": f"{found['model name']} ({', '.join(units)})",
        "kind": find_kind(flags, limit),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
        "isa": limit,
        "versions": {name: version(name) for name in ("torch", "transformers", "accelerate")},
        "date": time.strftime("%Y-%m-%d"),
    }


def describe_measurement(machine: Mapping[str, Any], command: str, packages: Sequence[str] = ()) -> str:
    """A sentence that says what measured, when, on what and with what.

    Args:
        machine: as `describe_machine` gives it.
        packages: whose versions are said besides.
    """
    found = {**machine["versions"], **{name: version(name) for name in packages}}
    versions = ", ".join(f"{name} {number}" for name, number in found.items())
    limit = f", limited by `ONEDNN_MAX_CPU_ISA={machine['isa']}`" if machine["isa"] else ""
    return (
        f"`{command}` on {machine['date']}: {machine['processor']}{limit}, {machine['cores']} cores, "
        f"`OMP_NUM_THREADS={machine['threads']}`, load average {machine['load_average']:.1f}; {versions}."
    )
