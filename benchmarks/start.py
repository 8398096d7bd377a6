"""How long commands take to answer, in turns within one run: bare Python, onecurve, and `accelerate launch --help`.

    python -m benchmarks.start            writes benchmarks/start.md

Each round starts every command once, so that what else the machine does falls on all of them alike.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
RECIPE = "training/recipes/demo.yaml"
THEIRS = "accelerate launch --help"
SUBCOMMANDS = ("run", "resume", "check", "plan", "watch", "compare", "report", "predict")


def list_commands() -> dict[str, list[str]]:
    """Name and words of each command, all started by this Python."""
    commands = {"python -c pass": ["-c", "pass"], "onecurve --help": ["-m", "launcher", "--help"]}
    for name in SUBCOMMANDS:
        commands[f"onecurve {name} --help"] = ["-m", "launcher", name, "--help"]
    commands |= {
        "onecurve run RECIPE --dry-run": ["-m", "launcher", "run", RECIPE, "--dry-run"],
        "onecurve check RECIPE": ["-m", "launcher", "check", RECIPE],
        "onecurve check": ["-m", "launcher", "check"],
        "onecurve plan RECIPE": ["-m", "launcher", "plan", RECIPE],
        THEIRS: ["-m", "accelerate.commands.accelerate_cli", "launch", "--help"],
    }
    return commands


def measure(commands: dict[str, list[str]], num_rounds: int) -> dict[str, list[float]]:
    """Seconds of each start, from the call to the exit; the first round only warms the disk's cache.

    Raises:
        RuntimeError: a command failed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for number in range(num_rounds + 1):
        for name, words in commands.items():
            started = time.perf_counter()
            result = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)
            if result.returncode != 0:
                raise RuntimeError(f"{name} ended with exit code {result.returncode}: {result.stderr[-500:]}")
            if number:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def render(seconds: dict[str, list[float]]) -> str:
    """The page."""
    theirs = statistics.median(seconds[THEIRS])
    rows = [
        f"| `{name}` | {statistics.median(times):.3f} | {min(times):.3f} | {theirs / statistics.median(times):.1f} |"
        for name, times in seconds.items()
    ]
    num_rounds = len(seconds[THEIRS])
    return (
        "# Time to answer\n\n"
        f"Written by `python -m benchmarks.start`: {num_rounds} rounds, each command once a round, Python "
        f"{platform.python_version()}, {platform.system()}.\n\n"
        "| command | median, seconds | fastest, seconds | times as fast as `accelerate launch --help` |\n"
        "|---|---|---|---|\n" + "\n".join(rows) + "\n"
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
