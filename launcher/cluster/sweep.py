"""The job array of a sweep. slurm/sweep.sh gets the command of each task from here.

python -m onecurve.launcher.cluster.sweep --task 2 --sweep SWEEP.yaml [--key value ...]
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from onecurve.launcher.errors import LauncherError, UsageError
from onecurve.launcher.launching.command import find_root
from onecurve.launcher.sweeps.check import find_folder
from onecurve.launcher.sweeps.settings import list_settings
from onecurve.launcher.sweeps.sweep_file import Sweep, load_sweep
from onecurve.launcher.sweeps.trials import name_run
from onecurve.training.config import RecipeError, parse_arguments


def load_array_sweep(path: Path) -> Sweep:
    """A sweep whose trials can be the tasks of an array.

    Raises:
        RecipeError: as `sweep_file.load_sweep`.
        UsageError: its trials are chosen one by one.
    """
    sweep = load_sweep(path)
    if sweep.strategy == "tpe":
        raise UsageError(
            f"{path}: strategy tpe chooses each trial from those before it, so they can't be tasks of an array; take strategy "
            "random, or start `onecurve sweep` without --slurm inside a job"
        )
    return sweep


def list_runs(sweep: Sweep, overrides: Mapping[str, str]) -> list[dict[str, str]]:
    """The overrides of each trial, including its run directory; their recipes are not validated.

    A task of a large array must not read all of them.

    Args:
        overrides: for all trials.
    """
    folder = find_folder(sweep, overrides)
    return [
        {**overrides, **settings, "output_dir": str(name_run(folder, number))}
        for number, settings in enumerate(list_settings(sweep))
    ]


def copy_sweep(sweep: Path, folder: Path) -> Path:
    """Copy the sweep file into the folder of the runs, named by its hash: waiting tasks read the copy, not the file.

    Raises:
        UsageError: the folder is not writable.
    """
    content = sweep.read_bytes()
    copy = folder / f"sweep-{hashlib.sha256(content).hexdigest()[:12]}.yaml"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(content)
    except OSError as error:
        raise UsageError(f"output_dir {str(folder)!r} can't be written to: {error.strerror}") from None
    return copy


def build_task(arguments: Sequence[str]) -> list[str]:
    """The command of one task of the array; without --task, that of the job that compares all trials.

    Raises:
        RecipeError, UsageError: the recipe or the sweep file is wrong, or there is no such task.
    """
    task, rest = _take(list(arguments), "task")
    sweep, rest = _take(rest, "sweep")
    options = []  # Options of `onecurve run`, which are not keys of the recipe.
    for name in ("topology", "num_processes", "num-processes"):
        value, rest = _take(rest, name)
        options += [f"--{name}={value}"] if value is not None else []
    _, overrides = parse_arguments(rest)
    if sweep is None:
        raise UsageError("sbatch --array 0-N slurm/sweep.sh --sweep SWEEP.yaml [--key value ...]")
    found = load_array_sweep(Path(sweep))
    if task is None:
        words = [f"--{key}={value}" for key, value in overrides.items()]
        return ["onecurve", "sweep", sweep, "--results", *words]
    runs = list_runs(found, overrides)
    if not task.isdigit() or int(task) >= len(runs):
        raise UsageError(
            f"{sweep} has {len(runs)} trials, so there is no task {task}: sbatch --array 0-{len(runs) - 1}"
        )
    words = [f"--{key}={value}" for key, value in runs[int(task)].items()]
    return ["bash", str(find_root() / "slurm" / "finetune.sh"), f"--config={found.recipe}", *options, *words]


def _take(words: list[str], name: str) -> tuple[str | None, list[str]]:
    """Take `--name value` or `--name=value` out of a command line."""
    for position, word in enumerate(words):
        if word.startswith(f"--{name}="):
            return word.partition("=")[2], words[:position] + words[position + 1 :]
        if word == f"--{name}" and position + 1 < len(words):
            return words[position + 1], words[:position] + words[position + 2 :]
    return None, words


def main() -> int:
    """Print the words of the command to stdout, each followed by a zero byte, which no word can contain."""
    try:
        words = build_task(sys.argv[1:])
    except (LauncherError, RecipeError) as error:
        print(f"onecurve: {error}", file=sys.stderr)
        return 2
    sys.stdout.buffer.write(b"".join(os.fsencode(word) + b"\0" for word in words))
    return 0


if __name__ == "__main__":
    sys.exit(main())
