"""The plan of a training far larger than this machine: a billion examples, 4,096 processes, any step.

    python -m benchmarks.scale                        about a minute, and 4 GB of disk for the lengths
    python -m benchmarks.scale --num_examples 1000000 a second

The plan is the real one (training/data/plan.py) over real lengths on disk; no process but this one is needed, because a plan
never asks the others. Prints a table, and writes it to build/benchmarks for benchmarks/RESULTS.md.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from benchmarks.speed_data import FOLDER
from onecurve.training.data.plan import EvaluationPlan, Order, TrainingPlan

NUM_EXAMPLES = 1_000_000_000
NUM_PROCESSES = 4096
EXAMPLES_PER_PROCESS = 16
_ROWS_PER_WRITE = 10_000_000


def write_lengths(path: Path, num_examples: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    """Lengths of 1 to 512 tokens on disk, memory-mapped as training/data/preparation.py maps them."""
    generator = np.random.default_rng(0)
    lengths = np.lib.format.open_memmap(path, mode="w+", dtype=np.int32, shape=(num_examples,))
    for start in range(0, num_examples, _ROWS_PER_WRITE):
        stop = min(start + _ROWS_PER_WRITE, num_examples)
        lengths[start:stop] = generator.integers(1, 513, stop - start, dtype=np.int32)
    lengths.flush()
    return np.load(path, mmap_mode="r")  # type: ignore[no-any-return]


def read_anonymous_bytes() -> int:
    """Memory of this process that is not a file's: pages of the mapped lengths belong to the system's cache."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def time_calls(call: Callable[[int], object], numbers: Sequence[int]) -> tuple[float, float]:
    """Median and largest seconds of a call."""
    seconds = []
    for number in numbers:
        started = time.perf_counter()
        call(number)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds), max(seconds)


def measure(num_examples: int, num_processes: int) -> list[tuple[str, str]]:
    """Rows of the table."""
    batch_size = num_processes * EXAMPLES_PER_PROCESS
    rows = []
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        lengths = write_lengths(Path(folder) / "lengths.npy", num_examples)
        before = read_anonymous_bytes()
        order = Order(num_examples, batch_size, 42, lengths, 32)
        last = 3 * order.steps_per_epoch - 1
        plan = TrainingPlan(order, last + 1, num_processes, EXAMPLES_PER_PROCESS)

        # A resume: nothing is known yet, and the step is anywhere.
        def start_at(step: int) -> object:
            order._window.cache_clear()
            return next(iter(TrainingPlan(order, last + 1, num_processes, EXAMPLES_PER_PROCESS, start_step=step)))

        starts = {
            name: time_calls(start_at, [step])[0]
            for name, step in (("first", 0), ("middle", last // 2), ("last", last))
        }
        in_order = range(last // 2, last // 2 + 64)
        typical, worst = time_calls(plan.micro_batches, in_order)
        after = read_anonymous_bytes()
        per_process = len(plan.micro_batches(0)) // num_processes
        padded = [plan.micro_batches(step)[0] for step in in_order]
        padding = 1 - sum(one.num_tokens for one in padded) / sum(one.num_padded_tokens for one in padded)
        rows += [
            ("examples in a step", f"{batch_size:,}"),
            ("steps of an epoch", f"{order.steps_per_epoch:,}"),
            *((f"start at the {name} step of three epochs", f"{took * 1e3:,.0f} ms") for name, took in starts.items()),
            (f"plan of a step, all {num_processes:,} processes", f"{typical * 1e3:,.1f} ms"),
            ("the same where a window begins", f"{worst * 1e3:,.0f} ms"),
            ("micro-batches of a process in a step", str(per_process)),
            ("padding", f"{padding:.2%}"),
            ("memory of the plan", f"{(after - before) / 2**20:,.0f} MiB"),
            ("lengths on disk, mapped", f"{num_examples * 4 / 2**30:,.1f} GiB"),
        ]  # fmt: skip
        # An evaluation sorts all its lengths, and gathers every prediction: it grows with its examples.
        num_evaluated = min(num_examples, 10_000_000)
        evaluation = EvaluationPlan(lengths[:num_evaluated], num_processes, EXAMPLES_PER_PROCESS)
        seconds = time_calls(lambda _: next(iter(evaluation)), [0])[0]
        rows.append((f"start of an evaluation of {num_evaluated:,} examples", f"{seconds:,.1f} s"))
    return rows


def to_markdown(rows: Sequence[tuple[str, str]], num_examples: int, num_processes: int) -> str:
    """The table for RESULTS.md."""
    title = f"## The plan of {num_examples:,} examples on {num_processes:,} processes (`python -m benchmarks.scale`)"
    return "\n".join(
        [title, "", "| what | measured |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows), ""]
    )


def main(arguments: Sequence[str]) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_examples", type=int, default=NUM_EXAMPLES)
    parser.add_argument("--num_processes", type=int, default=NUM_PROCESSES)
    options = parser.parse_args(arguments)
    os.makedirs(FOLDER / "results", exist_ok=True)
    text = to_markdown(
        measure(options.num_examples, options.num_processes), options.num_examples, options.num_processes
    )
    print(text)
    if options.num_examples == NUM_EXAMPLES:
        (FOLDER / "results" / "part_4_scale.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
