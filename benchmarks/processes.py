"""One process with all threads against one process a core: which makes more tokens on a CPU.

    python -m benchmarks.processes           about three minutes on two idle cores

Both are real trainings by `accelerate launch` on the same global batches; the rate is that of metrics.jsonl, without the
first steps. Prints a table, and writes it to build/benchmarks for benchmarks/RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.processor import choose_precision
from benchmarks.speed import Lock
from benchmarks.speed_data import FOLDER, ROOT, WORKLOADS, build_workload
from benchmarks.speed_page import describe_spread

_NUM_WARM_UP_STEPS = 3
# Name of the workload, examples of a step, steps.
_TRAININGS = (("minilm_long", 16, 9), ("minilm_short", 128, 20))


def measure_rate(name: str, train_batch_size: int, num_steps: int, num_processes: int, precision: str) -> float:
    """Real tokens a second of one training.

    Raises:
        SystemExit: it failed; its last words are shown.
    """
    workload = replace(WORKLOADS[name], train_batch_size=train_batch_size, pool=1000 if "long" in name else 2560)
    num_threads = (os.cpu_count() or 1) // num_processes
    output = FOLDER / "runs" / f"processes_{num_processes}"
    shutil.rmtree(output, ignore_errors=True)
    recipe = {
        **build_workload(workload),
        "mixed_precision": precision,
        "per_device_batch_size": str(min(workload.micro_batch_size, train_batch_size // num_processes)),
        "max_train_steps": str(num_steps + _NUM_WARM_UP_STEPS),
        "max_eval_samples": "4",
        "output_dir": str(output),
    }
    topology = "cpu" if num_processes == 1 else "multi_cpu"
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        f"accelerate_configs/{topology}.yaml",
    ]
    command += ["--num_processes", str(num_processes), "training/run.py"]
    command += [word for key, value in recipe.items() for word in (f"--{key}", value)]
    variables = {"OMP_NUM_THREADS": str(num_threads), "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    environment = {**os.environ, **variables, "ONECURVE_CACHE": str(FOLDER / "cache")}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{result.stderr[-3000:]}")
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if line["event"] == "train"][_NUM_WARM_UP_STEPS:]
    return float(
        sum(step["tokens"] for step in steps) / sum(step["tokens"] / step["tokens_per_second"] for step in steps)
    )


def main(arguments: Sequence[str]) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lock", type=Path, help="a file whose lock is held during each round")
    options = parser.parse_args(arguments)
    lock, num_cores, precision = Lock(options.lock), os.cpu_count() or 1, choose_precision()
    lines = [
        f"## {num_cores} processes against one (`python -m benchmarks.processes`)",
        "",
        f"| texts | one process, {num_cores} threads: tokens/s | {num_cores} processes, one thread each | ratio |",
        "|---|---|---|---|",
    ]
    for name, train_batch_size, num_steps in _TRAININGS:
        found: dict[int, list[float]] = {1: [], num_cores: []}
        for _ in range(options.rounds):
            with lock.round():
                for num_processes, rates in found.items():
                    rates.append(measure_rate(name, train_batch_size, num_steps, num_processes, precision))
        one, many = found.values()
        ratio = statistics.median(b / a for a, b in zip(one, many, strict=True))
        lines.append(f"| {name} | {describe_spread(one, 0)} | {describe_spread(many, 0)} | {ratio:.2f} |")
    lock.release()
    text = "\n".join([*lines, ""])
    print(text)
    (FOLDER / "results").mkdir(parents=True, exist_ok=True)
    (FOLDER / "results" / "part_1_processes.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
