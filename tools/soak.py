"""A hundred random kills of one training, and a curve that shows none of them: `make soak`.

    python -m tools.soak --kills 100 --launched 30

Of the kills, `--launched` hit rank 0, rank 1, the launcher or all of them, of two processes under FSDP2; the
others hit one process that is forked from a server with everything imported, which makes a start ten times as fast. Of
five kills one comes at a random time of a start, two while a checkpoint is being written, and two at a random time of the
training; the last tenth while `final/` is being written. In the end the curve and the final weights are compared, bit for
bit, with those of a run that nobody touched, and the result goes to `--output`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from onecurve.training.recovery.checkpoints import find_checkpoint
from tools.jobs import Job, count_lines, read_status, saving, without_time
from tools.trainings import DEMO, ROOT, build_news, build_tiny_model, to_flags

SETTINGS = {
    "max_length": 64, "train_batch_size": 16, "per_device_batch_size": 8, "learning_rate": 1e-3, "dropout": 0.1,
    "checkpointing_steps": 2, "save_total_limit": 2, "eval_steps": 50,
}  # fmt: skip


TOPOLOGY = "fsdp"
"""Of the launched ones: each process has its part of every weight, so a kill may also come while they are gathered."""

MOMENTS = ("a start", "a save", "a step", "a save", "a step")


@dataclass
class Tally:
    """What was killed, in what, how long the others took to end, and the next start to train again."""

    kills: Counter[str] = field(default_factory=Counter)
    kills_in: Counter[tuple[str, str]] = field(default_factory=Counter)
    end_seconds: dict[str, list[float]] = field(default_factory=dict)
    recovery_seconds: dict[str, list[float]] = field(default_factory=dict)

    def note(
        self, victim: str, moment: str, end_seconds: float, previous: str | None, recovery_seconds: float | None
    ) -> None:
        """Count a kill.

        Args:
            previous: the victim before, after which this start trained again; None for the first start.
            recovery_seconds: which this start took, if it had come to train.
        """
        self.kills[victim] += 1
        self.kills_in[victim, moment] += 1
        self.end_seconds.setdefault(victim, []).append(end_seconds)
        if previous is not None and recovery_seconds is not None:
            self.recovery_seconds.setdefault(previous, []).append(recovery_seconds)
        print(".", end="", flush=True)


def choose_moment(number: int, num_kills: int) -> str:
    """In what the kill of that number, from 0, is to come: at the end of them all the training is, too."""
    return "final/" if number >= num_kills - max(1, num_kills // 10) else MOMENTS[number % len(MOMENTS)]


def train_forked(settings: Mapping[str, Any], output: str) -> None:
    """The whole training in a process that has imported everything already."""
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    from onecurve.training import process, run
    from onecurve.training.outcome import report_outcome

    process._LAUNCHER_ID = os.getppid()  # Read at import, when that was the server's parent.
    os._exit(report_outcome(run.main, to_flags(settings)))


def wait_for_moment(
    path: Path, is_alive: Callable[[], bool], chance: random.Random, wanted: str, start_seconds: float
) -> tuple[str, float | None]:
    """Wait until it is time to kill.

    Args:
        wanted: one of MOMENTS, or "final/".
        start_seconds: how long starts take.

    Returns:
        what the process is doing, or "" if it has ended too early; and the seconds until it trained, if it does.
    """
    lines, started = count_lines(path), time.monotonic()
    if wanted == "final/":
        while is_alive() and not any(path.glob(".final.*.tmp")):
            time.sleep(0.0002)
        return "final/" * is_alive(), None
    moment = started + (chance.uniform(0, start_seconds) if wanted == "a start" else 1e9)
    while is_alive() and count_lines(path) == lines:  # The start, with what it cuts back, comes first.
        if time.monotonic() > moment:
            return "a start", None
        time.sleep(0.002)
    seconds = time.monotonic() - started
    moment = time.monotonic() + chance.uniform(0, 0.6)
    while is_alive():
        in_save = any(saving(path))
        if in_save if wanted == "a save" else time.monotonic() > moment:
            return "a save" if in_save else "a step", seconds
        time.sleep(0.0002)
    return "", None


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
    context.set_forkserver_preload(["onecurve.training.run"])

    def fork(name: str, steps: int) -> Any:
        here = {**settings, "output_dir": str(folder / name), "max_train_steps": steps}
        process = context.Process(target=train_forked, args=(here, str(folder / f"{name}.output")))
        process.start()
        return process

    whole = fork("whole", num_steps)
    whole.join()
    assert whole.exitcode == 0, (folder / "whole.output").read_text()

    start_seconds = 5.0
    num_forked = num_kills - num_launched
    for number in range(num_forked):
        wanted = choose_moment(number, num_forked)
        process = fork("killed", num_steps)
        moment, seconds = wait_for_moment(folder / "killed", process.is_alive, chance, wanted, start_seconds)
        started = time.monotonic()
        process.kill()
        process.join()
        assert moment, (folder / "killed.output").read_text() + "\nfinished too early: raise --steps"
        tally.note("process", moment, time.monotonic() - started, "process" if number else None, seconds)
        start_seconds = seconds or start_seconds
        check_nothing_is_lost(folder / "killed")
    last = fork("killed", num_steps)
    last.join()
    assert last.exitcode == 0, (folder / "killed.output").read_text()
    compare(folder / "whole", folder / "killed")

    if num_launched:
        launched = {**settings, "max_train_steps": num_steps}
        run = Job({**launched, "output_dir": str(folder / "whole2")}, TOPOLOGY, 2).finish()
        assert run.exit_code == 0, run.stdout
        here = {**launched, "output_dir": str(folder / "killed2")}
        start_seconds, previous = 15.0, None
        for number in range(num_launched):
            wanted = choose_moment(number, num_launched)
            victims = ("rank 0", "rank 1", "launcher", "all")
            # Without its launcher, a training that is writing final/ just finishes.
            victim = "all" if wanted == "final/" else victims[number % len(victims)]
            job = Job(here, TOPOLOGY, 2)
            job.wait_for_ranks()
            moment, seconds = wait_for_moment(job.path, job.is_running, chance, wanted, start_seconds)
            assert moment, job.output + "\nfinished too early: raise --steps"
            job.strike(victim)
            ended = job.wait_for_end()
            # Before it looks for its launcher, a rank imports its packages.
            assert ended < (60 if (victim, moment) == ("launcher", "a start") else 30), ended
            tally.note(victim, moment, ended, previous, seconds)
            previous = victim
            start_seconds = seconds or start_seconds
            check_nothing_is_lost(job.path)
        run = Job(here, TOPOLOGY, 2).finish()
        assert run.exit_code == 0, run.stdout
        compare(folder / "whole2", folder / "killed2")
    return tally


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


def describe(tally: Tally) -> str:
    """The result as a page."""
    num_kills = sum(tally.kills.values())
    lines = [
        "# A training that is killed again and again",
        "",
        "<!-- Written by tools/soak.py. -->",
        "",
        f"`python -m tools.soak` on {date.today()}, {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f} at the end: "
        f"{num_kills} kills (`kill -9`). **Lost: nothing.**",
        "Every checkpoint that had its name was whole after each kill, and in the end each curve and the final weights were,",
        "bit for bit, those of a run that nobody touched. Seconds are medians, with the slowest.",
        "",
        "| killed | times | in a start | in a save | in `final/` | until all its processes had ended | until the next start "
        "trained again |",
        "|---|---|---|---|---|---|---|",
    ]
    for victim, count in tally.kills.items():
        moments = [str(tally.kills_in[victim, moment]) for moment in ("a start", "a save", "final/")]
        seconds = [_describe_seconds(found.get(victim, [])) for found in (tally.end_seconds, tally.recovery_seconds)]
        lines.append(f"| {' | '.join([NAMES[victim], str(count), *moments, *seconds])} |")
    lines += [
        "",
        "The process alone is forked with everything imported; the others are two processes under FSDP2, whose start",
        "is mostly the import of its packages. A launcher's death is noticed by its ranks, which save before they end.",
    ]
    return "\n".join(lines) + "\n"


NAMES = {
    "process": "the process, alone",
    "rank 0": "rank 0 of two",
    "rank 1": "rank 1 of two",
    "launcher": "the launcher of two",
    "all": "all at once",
}


def _describe_seconds(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.1f} ({max(seconds):.1f})" if seconds else "-"


def main() -> None:
    """Soak, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument(
        "--launched", type=int, default=28, help="of them, kills in `accelerate launch` of two processes"
    )
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "soak.md")
    options = parser.parse_args()
    if not (DEMO / "complete").exists():
        sys.exit("build/demo is missing: `make demo` builds it")
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ONECURVE_CACHE"] = str(Path(folder) / "cache")
        tally = soak(Path(folder), options.kills, options.launched, options.steps, options.seed)
    page = describe(tally)
    options.output.write_text(page, encoding="utf-8")
    print(f"\n{page}")


if __name__ == "__main__":
    main()
