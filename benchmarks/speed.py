"""Onecurve and what people would use instead, taking turns on the same texts, in the precision that this
processor trains fastest in: `make bench` writes a section of benchmarks/RESULTS.md.

    python -m benchmarks.speed                     about 25 minutes on two idle cores
    python -m benchmarks.speed --only minilm_long  one table
    python -m benchmarks.speed --quick             a minute, with a tiny model; writes nothing
    python -m benchmarks.speed --masks             dropout masks by example against torch's: prints a table a workload

Each way (benchmarks/speed_ways.py) is a process that is set up once and then waits. Turns go a, b, c, ..., a, b, c, ...:
what else happens on the machine hits all alike, and a ratio is taken within a round. All have the same threads and the
allocator settings that `onecurve run` gives, which make the others faster than they are as they come.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from benchmarks.processor import GLIBC_ALLOCATOR, PRECISION, choose_precision, describe_machine
from benchmarks.speed_data import FOLDER, PREFIX, ROOT, WORKLOADS, Workload, build_workload, count_tokens
from benchmarks.speed_page import STEPS_PER_LOOK, TABLES, TARGET_ACCURACY, to_accuracy_table, to_table, update_page

_MOST_LOOKS = 20
_MOST_SECONDS_HELD = 175


class Worker:
    """A way in its process, which runs the program `ways`."""

    def __init__(self, way: str, name: str, flags: Sequence[str], ways: str = "benchmarks.speed_ways") -> None:
        self.way = way
        environment = {**os.environ, **GLIBC_ALLOCATOR, "HF_HUB_OFFLINE": "1", "ONECURVE_CACHE": str(FOLDER / "cache")}
        command = [sys.executable, "-m", ways, way, name, *flags]
        self._log = (FOLDER / f"{name}_{way}.log").open("w+", encoding="utf-8")
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def read(self) -> dict[str, Any]:
        """The next answer.

        Raises:
            SystemExit: the process ended; its last words are shown.
        """
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(PREFIX):
                found: dict[str, Any] = json.loads(line.removeprefix(PREFIX))
                return found
        self._log.seek(0)
        raise SystemExit(f"way {self.way} ended:\n{self._log.read()[-3000:]}")

    def ask(self, **wanted: Any) -> dict[str, Any]:
        """Give it its turn."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(wanted) + "\n")
        self._process.stdin.flush()
        return self.read()

    def stop(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._log.close()


@dataclass
class Turns:
    """What a way did in its turns."""

    examples_per_second: list[float] = field(default_factory=list)
    tokens_per_second: list[float] = field(default_factory=list)
    flops_per_second: list[float] = field(default_factory=list)
    padding: list[float] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)
    examples_per_cpu_second: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    def add(self, turn: dict[str, Any], shape: tuple[int, int, int], mean_length: float, cuts_last_layer: bool) -> None:
        """Add a turn; `shape` as `read_shape` gives it.

        Ways see other texts in the few steps of a turn, some of them sorted by length: what they have in common is
        tokens. An "example" is as many of these as a text of the data has on average.
        """
        lengths, seconds = turn["lengths"], turn["seconds"]
        self.examples_per_second.append(sum(lengths) / mean_length / seconds)
        self.examples_per_cpu_second.append(sum(lengths) / mean_length / turn["cpu_seconds"])
        self.tokens_per_second.append(sum(lengths) / seconds)
        self.flops_per_second.append(count_flops(lengths, shape, cuts_last_layer) / seconds)
        self.padding.append(1 - sum(lengths) / turn["padded"])
        self.waited.append(turn.get("waited", 0.0) / seconds)
        self.peak_bytes = max(self.peak_bytes, turn.get("peak_bytes", 0))


def read_shape(model: str) -> tuple[int, int, int]:
    """Weights of the layers' matrices, layers, hidden size."""
    config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    return layers * (4 * hidden**2 + 2 * hidden * config["intermediate_size"]), layers, hidden


def count_flops(lengths: Sequence[int], shape: tuple[int, int, int], cuts_last_layer: bool = False) -> float:
    """Of forward and backward on texts without their padding: 6 a weight and token, and attention's two products.

    The rule of Kaplan et al. 2020 ("Scaling Laws for Neural Language Models", section 2.1), with a factor 3 for the
    backward pass. Embeddings, norms and softmax are not counted. A last layer that is cut (training/models/last_layer.py) makes
    keys and values of all tokens, and all else of one.
    """
    weights, layers, hidden = shape
    whole = sum(6 * weights * length + 12 * layers * hidden * length**2 for length in lengths)
    if not cuts_last_layer:
        return float(whole)
    left_out = weights // layers - 2 * hidden**2
    return float(whole - sum((6 * left_out + 12 * hidden * length) * (length - 1) for length in lengths))


class Lock:
    """A file's lock, on a machine that others use as well: held for as many rounds as fit into three minutes.

    Args:
        path: the file; None holds nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._file: IO[str] | None = None
        self._since = 0.0

    @contextmanager
    def round(self) -> Iterator[None]:
        """Hold the lock for a round, and let go afterwards if another such round would take too long."""
        if self._file is None and self._path is not None:
            self._file = self._path.open("a")
            fcntl.flock(self._file, fcntl.LOCK_EX)
            self._since = time.perf_counter()
        started = time.perf_counter()
        yield
        now = time.perf_counter()
        if now - self._since + (now - started) > _MOST_SECONDS_HELD:
            self.release()

    def release(self) -> None:
        """Let others go on."""
        if self._file is not None:
            self._file.close()
            self._file = None


def start_workers(ways: str, workload: Workload, flags: Sequence[str]) -> dict[str, Worker]:
    """Start the ways one after the other; f lives in e's process."""
    workers = {}
    for way in ways:
        if way != "f":
            workers[way] = Worker(way, workload.name, flags if way in "eghj" else ())
            workers[way].read()
    return workers


def measure(workload: Workload, ways: str, flags: Sequence[str], lock: Lock) -> dict[str, Any]:
    """Let the ways take their turns, after one that doesn't count."""
    settings = build_workload(workload)
    shape = read_shape(settings["model_name_or_path"])
    texts = [json.loads(line)["text"] for line in Path(settings["train_file"]).read_text(encoding="utf-8").splitlines()]
    mean_length = statistics.mean(count_tokens(texts))
    workers = start_workers(ways, workload, flags)
    turns = {way: Turns() for way in ways}
    peaks: list[dict[str, Any]] = []
    for number in range(workload.rounds + 1):
        with lock.round():
            for way in ways:
                if way == "f":
                    turn = workers["e"].ask(do="floor")
                else:
                    num_steps = 1 if way == "a" or not number else workload.steps
                    turn = workers[way].ask(do="train", steps=num_steps)
                if number:
                    turns[way].add(turn, shape, mean_length, cuts_last_layer=way in "efghj")
            if number:
                peaks.append(workers["e"].ask(do="peak"))
        print(f"{workload.name}: round {number} of {workload.rounds}", file=sys.stderr, flush=True)
    for worker in workers.values():
        worker.stop()
    return {
        "workload": workload.name,
        "ways": {way: vars(found) for way, found in turns.items()},
        "peaks": peaks,
        "precision": choose_precision(),
        "machine": describe_machine(),
    }


def measure_accuracy(workload: Workload, lock: Lock) -> dict[str, Any]:
    """Train each way until it sorts the validation texts; only the training's seconds count."""
    build_workload(workload)
    workers = start_workers(workload.ways, workload, ())
    curves: dict[str, list[tuple[float, float]]] = {way: [] for way in workload.ways}
    seconds = dict.fromkeys(workload.ways, 0.0)
    for _ in range(_MOST_LOOKS):
        for way, worker in workers.items():
            if not curves[way] or curves[way][-1][1] < TARGET_ACCURACY:
                with lock.round():
                    seconds[way] += worker.ask(do="train", steps=STEPS_PER_LOOK)["seconds"]
                    curves[way].append((seconds[way], worker.ask(do="accuracy")["accuracy"]))
        print({way: curve[-1] for way, curve in curves.items()}, file=sys.stderr, flush=True)
        if all(curve[-1][1] >= TARGET_ACCURACY for curve in curves.values()):
            break
    for worker in workers.values():
        worker.stop()
    return {"workload": workload.name, "curves": curves, "precision": choose_precision(), "machine": describe_machine()}


def main(arguments: Sequence[str]) -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = ",".join((*TABLES, "accuracy"))
    parser.add_argument("--only", default=tables, help="tables, with commas between; none writes the page anew")
    parser.add_argument("--ways", help="letters of the ways; all of the table by default")
    parser.add_argument("--rounds", type=int, help="turns of each way; the table's own by default")
    parser.add_argument("--quick", action="store_true", help="a minute with a tiny model; writes nothing")
    parser.add_argument("--print", action="store_true", help="print the tables and write nothing")
    parser.add_argument("--masks", action="store_true", help=f"as --print --ways ej --only {','.join(TABLES[:4])}")
    parser.add_argument("--lock", type=Path, help="a file whose lock is held during each round")
    options, flags = parser.parse_known_args(arguments)
    if options.masks:
        options.only, options.ways, options.print = ",".join(TABLES[:4]), "ej", True
    lock = Lock(options.lock)
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    # Threads that wait sleep: spinning on a busy machine, they would measure its other work.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    folder = FOLDER / "results"
    folder.mkdir(parents=True, exist_ok=True)
    if options.only == "none":
        update_page(folder)
        return
    os.environ[PRECISION] = choose_precision()
    for name in ["quick"] if options.quick else options.only.split(","):
        workload = WORKLOADS[name]
        workload = replace(workload, rounds=options.rounds or workload.rounds)
        if name == "accuracy":
            result = measure_accuracy(workload, lock)
        else:
            result = measure(workload, options.ways or workload.ways, flags, lock)
        lock.release()
        if options.quick or options.print:
            print("\n".join(to_table(result) if name != "accuracy" else to_accuracy_table(result)))
        else:
            (folder / f"{name}.json").write_text(json.dumps(result), encoding="utf-8")
            update_page(folder)


if __name__ == "__main__":
    main(sys.argv[1:])
