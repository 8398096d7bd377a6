"""Everything that can only be seen on a GPU, in under nine minutes, without a network.

    python -m benchmarks.gpu                       on a machine with one or more NVIDIA GPUs; writes gpu.json and gpu.md
    python -m benchmarks.gpu --tiny --only resume  the same code at sizes for a CPU; its figures mean nothing

A part that fails is reported, and the others go on. build/demo must be there (`make setup` builds it).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.scene import Row, Scene

SECONDS = 530.0


def describe_devices() -> dict[str, Any]:
    """The devices and the versions of what runs on them."""
    import torch

    devices = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    versions = {}
    for name in ("torch", "accelerate", "transformers", "deepspeed", "peft", "flash-attn"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "-"
    versions |= {"python": sys.version.split()[0], "cudnn": str(torch.backends.cudnn.version() or "-")}  # type: ignore[no-untyped-call]
    if torch.cuda.is_available():
        versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False).stdout.split()
    except (OSError, subprocess.TimeoutExpired):
        driver = []
    return {
        "devices": [f"{each.name}, {each.total_memory / 2**30:.0f} GiB" for each in devices],
        "driver": driver[0] if driver else "-",
        "cuda": torch.version.cuda or "-",
        "versions": versions,
    }


def run_part(name: str, scene: Scene) -> list[Row]:
    """The rows of a part; one row with the error if it fails."""
    if scene.seconds_left() <= 0:
        return [Row("not begun", "the time was over", "SKIPPED")]
    try:
        return PARTS[name](scene)
    except Exception as error:  # Whatever it is, the other parts go on.
        traceback.print_exc()
        return [Row(f"{type(error).__name__}", " ".join(str(error).split())[-300:], "FAILED")]


def build_page(report: Mapping[str, Any]) -> str:
    """gpu.md: a report's parts as tables."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items() if version != "-")
    commit = f", commit {report['commit']}" if "commit" in report else ""
    lines = ["# On a GPU, measured", "", "<!-- Written by benchmarks/gpu from gpu.json. -->", ""]
    lines += [
        f"{'; '.join(report['devices'])}, driver {report['driver']}, CUDA {report['cuda']}; {versions}{commit}.",
        "",
    ]
    for name, part in report["parts"].items():
        lines += [f"## {name} ({part['seconds']:.0f} s)", "", "| what | figure | |", "|---|---|---|"]
        lines += [f"| {row['what']} | {row['figure'].strip()} | {row['verdict']} |" for row in part["rows"]]
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    """Run the parts, write gpu.json after each, print the table; returns 1 if a part failed or an invariant broke."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--tiny", action="store_true", help="sizes that a CPU can do")
    parser.add_argument("--output", type=Path, default=Path("gpu.json"))
    parser.add_argument("--seconds", type=float, default=SECONDS, help="parts that would begin later are skipped")
    options = parser.parse_args()
    found = describe_devices()
    num_gpus = len(found["devices"])
    if not num_gpus and not options.tiny:
        print(
            "benchmarks.gpu: PyTorch finds no NVIDIA GPU here; --tiny tries the command itself on a CPU",
            file=sys.stderr,
        )
        return 2
    end = time.monotonic() + options.seconds
    report: dict[str, Any] = {**found, "is_tiny": options.tiny, "parts": {}}
    print(
        "; ".join(found["devices"]) or "no GPU",
        f"| driver {found['driver']}, CUDA {found['cuda']} |",
        found["versions"],
    )
    has_failed = False
    with tempfile.TemporaryDirectory(prefix="onecurve-gpu-") as folder:
        scene = Scene(Path(folder), options.tiny, num_gpus, lambda: end - time.monotonic(), report)
        for name in options.only.split(","):
            started = time.monotonic()
            rows = run_part(name, scene)
            seconds = time.monotonic() - started
            report["parts"][name] = {"seconds": seconds, "rows": [vars(row) for row in rows]}
            options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            options.output.with_suffix(".md").write_text(build_page(report), encoding="utf-8")
            print(f"\n{name} ({seconds:.0f} s)")
            for row in rows:
                print(f"  {row.what:45s} {row.figure}  {row.verdict}", flush=True)
            has_failed |= any(row.verdict in ("FAILED", "DEVIATES", "DIFFERS", "WAITS") for row in rows)
    return 1 if has_failed else 0


if __name__ == "__main__":
    sys.exit(main())
