"""A hundred random kills of one training, and a curve that shows none of them: `make soak`.

    python -m tests.soak --kills 100 --launched 30

Of the kills, `--launched` hit rank 0, rank 1, the launcher or all of them, of `accelerate launch` with two processes; the
others hit one process that is forked from a server with everything imported, which makes a start ten times as fast. Half
of all kills wait for the moment at which a checkpoint is being written. In the end the curve and the final weights are
compared, bit for bit, with those of a run that nobody touched.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.conftest import DEMO, build_news, build_tiny_model, to_flags
from tests.jobs import Job, count_lines, read_status, saving, without_time
from training.checkpointing import find_checkpoint

SETTINGS = {
    "max_length": 64, "train_batch_size": 16, "per_device_batch_size": 8, "learning_rate": 1e-3, "dropout": 0.1,
    "checkpointing_steps": 2, "save_total_limit": 2, "eval_steps": 50,
}  # fmt: skip


@dataclass
class Tally:
    """What was killed, and what it took to go on."""

    kills: Counter[str] = field(default_factory=Counter)
    kills_in_a_save: Counter[str] = field(default_factory=Counter)
    recovery_seconds: dict[str, list[float]] = field(default_factory=dict)


def train_forked(settings: Mapping[str, Any], output: str) -> None:
    """The whole training in a process that has imported everything already."""
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    from training import faults, run
    from training.faults import report_outcome

    faults._LAUNCHER = os.getppid()  # Read at import, when that was the server's parent.
    os._exit(report_outcome(run.main, to_flags(settings)))


def wait_for_moment(path: Path, is_alive: Any, chance: random.Random) -> tuple[bool, bool]:
    """Wait for some new lines, and in half of all cases for a save that is under way.

    Returns:
        whether the process is still there to be killed, and whether it is in a save.
    """
    lines, wanted = count_lines(path), chance.randint(1, 6)
    in_save = chance.random() < 0.5
    while is_alive() and count_lines(path) == lines:  # The start, with what it cuts back, comes first.
        time.sleep(0.002)
    after = time.monotonic() + chance.uniform(0, 0.2) * wanted
    while is_alive():
        if in_save and any(saving(path)):
            return True, True
        if not in_save and time.monotonic() > after:
            return True, any(saving(path))
        time.sleep(0.0002)
    return False, False


def soak(folder: Path, num_kills: int, num_launched: int, num_steps: int, seed: int) -> Tally:
    """Kill and start again until the kills are done, let each of the two runs finish, and compare.

    Raises:
        AssertionError: something was lost.
    """
    chance, tally = random.Random(seed), Tally()
    settings = {**SETTINGS, "model_name_or_path": str(build_tiny_model(folder / "tiny"))}
    build_news(folder)
    settings.update(train_file=str(folder / "train.jsonl"), validation_file=str(folder / "validation.jsonl"))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training.run"])

    def fork(name: str, steps: int) -> Any:
        here = {**settings, "output_dir": str(folder / name), "max_train_steps": steps}
        process = context.Process(target=train_forked, args=(here, str(folder / f"{name}.output")))
        process.start()
        return process

    whole = fork("whole", num_steps)
    whole.join()
    assert whole.exitcode == 0, (folder / "whole.output").read_text()

    while tally.kills["process"] < num_kills - num_launched:
        process = fork("killed", num_steps)
        started = time.monotonic()
        is_there, in_save = wait_for_moment(folder / "killed", process.is_alive, chance)
        process.kill()
        process.join()
        assert is_there, (folder / "killed.output").read_text() + "\nfinished too early: raise --steps"
        note(tally, "process", in_save, time.monotonic() - started)
        check_nothing_is_lost(folder / "killed")
    last = fork("killed", num_steps)
    last.join()
    assert last.exitcode == 0, (folder / "killed.output").read_text()
    compare(folder / "whole", folder / "killed")

    if num_launched:
        launched = {**settings, "max_train_steps": num_steps}
        run = Job({**launched, "output_dir": str(folder / "whole2")}, "multi_cpu", 2).finish()
        assert run.exit_code == 0, run.stdout
        here = {**launched, "output_dir": str(folder / "killed2")}
        for number in range(num_launched):
            victim = ("rank 0", "rank 1", "launcher", "all")[number % 4]
            job = Job(here, "multi_cpu", 2)
            started = time.monotonic()
            is_there, in_save = wait_for_moment(job.path, lambda job=job: job.process.poll() is None, chance)
            assert is_there, job.output
            seconds = time.monotonic() - started
            job.strike(victim)
            assert job.wait_for_end() < 30
            note(tally, victim, in_save, seconds)
            check_nothing_is_lost(job.path)
        run = Job(here, "multi_cpu", 2).finish()
        assert run.exit_code == 0, run.stdout
        compare(folder / "whole2", folder / "killed2")
    return tally


def note(tally: Tally, victim: str, in_save: bool, seconds: float) -> None:
    tally.kills[victim] += 1
    tally.kills_in_a_save[victim] += in_save
    tally.recovery_seconds.setdefault(victim, []).append(seconds)
    print(".", end="", flush=True)


def check_nothing_is_lost(path: Path) -> None:
    """No checkpoint that has its name is damaged."""
    found, faults = find_checkpoint(path / "checkpoints")
    assert not faults, faults
    assert found is not None or count_lines(path) < 8


def compare(whole: Path, killed: Path) -> None:
    """The same curve and the same model, to the last bit."""
    import json

    lines = [
        without_time([json.loads(text) for text in (path / "metrics.jsonl").read_text().splitlines()])
        for path in (whole, killed)
    ]
    assert lines[0] == lines[1], "a step is missing, twice, or different"
    weights = [(path / "final" / "model.safetensors").read_bytes() for path in (whole, killed)]
    assert weights[0] == weights[1]
    assert read_status(killed)["state"] == "finished"


def main() -> None:
    """Soak, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument(
        "--launched", type=int, default=28, help="of them, kills in `accelerate launch` of two processes"
    )
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if not (DEMO / "complete").exists():
        sys.exit("build/demo is missing: `make demo` builds it")
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ONECURVE_CACHE"] = str(Path(folder) / "cache")
        tally = soak(Path(folder), options.kills, options.launched, options.steps, options.seed)
    table = Table("killed", "times", "in a save", "seconds to the next step, median", "slowest")
    for victim, count in tally.kills.items():
        seconds = sorted(tally.recovery_seconds[victim])
        row = (count, tally.kills_in_a_save[victim], f"{seconds[len(seconds) // 2]:.1f}", f"{seconds[-1]:.1f}")
        table.add_row(victim, *map(str, row))
    Console().print("\n", table)
    print(f"{sum(tally.kills.values())} kills; curves and final weights are those of the runs that nobody touched")


if __name__ == "__main__":
    main()
