"""How long a training of two processes takes to recover from each fault: writes benchmarks/recovery.md.

    python -m tools.recovery

Each fault hits the same training in turn: seconds until all its processes had ended, then, started again, until it has
written a newer checkpoint than any before. tests/test_faults.py and tools/soak.py show that nothing is lost.
"""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

from onecurve.training.recovery.checkpoints import find_checkpoint
from tools.jobs import Job
from tools.trainings import ROOT, build_news, build_tiny_model

SETTINGS = {
    "max_length": 64, "train_batch_size": 16, "per_device_batch_size": 8, "checkpointing_steps": 10, "eval_steps": 100_000,
    "max_train_steps": 100_000, "num_train_epochs": 10_000, "hang_timeout_seconds": 2,
    "save_total_limit": 3,
}  # fmt: skip


def _kill_all(job: Job) -> None:
    job.strike("all")


def _flip_a_byte(job: Job) -> None:
    job.strike("all")
    file = max(_newest(job.path).glob("model*.safetensors"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _remove_the_manifest(job: Job) -> None:
    job.strike("all")
    (_newest(job.path) / "manifest.json").unlink()


def _freeze(job: Job) -> None:
    job.ranks()[1].send_signal(signal.SIGSTOP)


def _ask_to_stop(job: Job) -> None:
    (job.path / "STOP").touch()


FAULTS: dict[str, Callable[[Job], None]] = {
    "asked to stop by a file `STOP`": _ask_to_stop,
    "`kill -9` of rank 0": lambda job: job.strike("rank 0"),
    "`kill -9` of rank 1": lambda job: job.strike("rank 1"),
    "`kill -9` of the launcher": lambda job: job.strike("launcher"),
    "`kill -9` of all, as a power cut": _kill_all,
    "the same, and a byte of the newest checkpoint flipped": _flip_a_byte,
    "the same, and the newest checkpoint's manifest gone": _remove_the_manifest,
    "a frozen rank, `hang_timeout_seconds: 2`": _freeze,
}


def _newest(path: Path) -> Path:
    return max((path / "checkpoints").glob("step_*"))


def measure(settings: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Seconds to the end, and to a newer checkpoint, of each fault."""
    found = {}
    path = Path(settings["output_dir"])
    job = Job(settings, "multi_cpu", 2)
    job.wait_until(lambda: len(list((path / "checkpoints").glob("step_*"))) >= 3, what="three checkpoints")
    for name, strike in FAULTS.items():
        started = time.monotonic()
        strike(job)
        job.wait_for_end()
        end_seconds, newest, started = time.monotonic() - started, _newest(path).name, time.monotonic()
        job = Job(settings, "multi_cpu", 2)
        job.wait_until(lambda before=newest: _newest(path).name > before, what="a newer checkpoint")  # type: ignore[misc]
        found[name] = (end_seconds, time.monotonic() - started)
        assert find_checkpoint(path / "checkpoints")[0] is not None
    job.strike("all")
    return found


def main() -> None:
    """Measure, and write the page."""
    os.environ.update(HF_HUB_OFFLINE="1", OMP_WAIT_POLICY="PASSIVE")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["ONECURVE_CACHE"] = str(folder / "cache")
        build_news(folder)
        found = measure(
            {
                **SETTINGS,
                "model_name_or_path": str(build_tiny_model(folder / "tiny")),
                "train_file": str(folder / "train.jsonl"),
                "validation_file": str(folder / "validation.jsonl"),
                "output_dir": str(folder / "run"),
            }
        )
    lines = [
        "# How long recovery takes",
        "",
        f"<!-- Written by tools/recovery.py on {date.today()}. -->",
        "",
        f"Two processes, {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}; one strike each. Nearly all of the",
        "second column is the import of packages.",
        "",
        "| fault | seconds until all processes had ended | seconds from the next start to a newer checkpoint |",
        "|---|---|---|",
        *(f"| {name} | {ended:.1f} | {recovered:.1f} |" for name, (ended, recovered) in found.items()),
    ]
    (ROOT / "benchmarks" / "recovery.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
