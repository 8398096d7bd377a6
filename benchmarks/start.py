"""How long commands take to answer, in turns within one run: bare Python, onecurve, and `accelerate launch --help`.

    python -m benchmarks.start            writes benchmarks/start.md

Each round starts every command once, so that what else the machine does falls on all of them alike. Processor seconds do
not count it at all.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
RECIPE = "training/recipes/demo.yaml"
THEIRS = "accelerate launch --help"
SUBCOMMANDS = ("run", "resume", "check", "plan", "watch", "compare", "report", "predict")


def list_commands() -> dict[str, list[str]]:
    """Name and words of each command, all started by this Python."""
    commands = {"python -c pass": ["-c", "pass"], "onecurve --help": ["-m", "onecurve", "--help"]}
    for name in SUBCOMMANDS:
        commands[f"onecurve {name} --help"] = ["-m", "onecurve", name, "--help"]
    commands |= {
        "onecurve run RECIPE --dry-run": ["-m", "onecurve", "run", RECIPE, "--dry-run"],
        "onecurve check RECIPE": ["-m", "onecurve", "check", RECIPE],
        "onecurve check": ["-m", "onecurve", "check"],
        "onecurve plan RECIPE": ["-m", "onecurve", "plan", RECIPE],
        THEIRS: ["-m", "accelerate.commands.accelerate_cli", "launch", "--help"],
    }
    return commands


@dataclass(frozen=True)
class Start:
    """One start of one command, from the call to the exit.

    Attributes:
        seconds: by the clock.
        processor_seconds: user and system time of the process and its children.
    """

    seconds: float
    processor_seconds: float


def measure(commands: dict[str, list[str]], num_rounds: int) -> dict[str, list[Start]]:
    """Every start of each command; the first round only warms the disk's cache.

    Raises:
        RuntimeError: a command failed.
    """
    starts: dict[str, list[Start]] = {name: [] for name in commands}
    for number in range(num_rounds + 1):
        for name, words in commands.items():
            before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
            result = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)
            seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
            if result.returncode != 0:
                raise RuntimeError(f"{name} ended with exit code {result.returncode}: {result.stderr[-500:]}")
            if number:
                used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
                starts[name].append(Start(seconds, used))
    return starts


def render(starts: dict[str, list[Start]]) -> str:
    """The page."""
    theirs = statistics.median(start.seconds for start in starts[THEIRS])
    rows = []
    for name, found in starts.items():
        seconds = [start.seconds for start in found]
        median, used = statistics.median(seconds), statistics.median(start.processor_seconds for start in found)
        rows.append(f"| `{name}` | {median:.3f} | {min(seconds):.3f} | {used:.3f} | {theirs / median:.1f} |")
    where = f"Python {platform.python_version()}, {platform.system()}"
    load = f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    return (
        "# Time to answer\n\n"
        f"Written by `python -m benchmarks.start`: {len(starts[THEIRS])} rounds, each command once a round, {where};\n{load}. "
        "Seconds; the last column is the median of `accelerate launch --help` over the command's.\n\n"
        "| command | median | fastest | processor time | times as fast |\n|---|---|---|---|---|\n"
        + "\n".join(rows)
        + "\n"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--num_rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".md"))
    options = parser.parse_args(arguments)
    text = render(measure(list_commands(), options.num_rounds))
    options.output.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
