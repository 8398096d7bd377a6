"""A sweep file: the settings of each run of a job array. slurm/sweep.sh gets the command of each task from here.

::

    grid:                                  every combination, the last key fastest
      learning_rate: [1e-5, 3e-5]
      seed: [1, 2]

    runs:                                  or a list
      - {learning_rate: 1e-5, seed: 1}
      - {learning_rate: 3e-5}

    python -m onecurve.launcher.cluster.sweep --task 2 --config RECIPE.yaml --sweep SWEEP.yaml [--key value ...]
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from onecurve.launcher.errors import LauncherError, UsageError
from onecurve.launcher.facts.recipes import load_recipe
from onecurve.launcher.launching.command import find_root
from onecurve.training.config import RecipeError, all_keys, find_nearest, parse_arguments
from onecurve.training.run_directory import RunDirectory

# More runs than any Slurm takes in one array.
_MAX_RUNS = 1_000_000

# Each run has its own run directory, and `resume` belongs to a start, not to a run.
_NOT_SWEPT = frozenset({"output_dir", "resume"})


def load_sweep(path: Path) -> list[dict[str, str]]:
    """The overrides of each run, as strings like those of the command line.

    Raises:
        UsageError: the file is not valid; all problems at once.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or set(content) not in ({"grid"}, {"runs"}):
        raise UsageError(
            f"{path}: must have either `grid:` (keys with lists of values) or `runs:` (a list of mappings)"
        )
    if "grid" in content:
        runs = _expand_grid(path, content["grid"])
    else:
        runs = content["runs"]
        if not isinstance(runs, list) or not runs or not all(isinstance(run, dict) and run for run in runs):
            raise UsageError(f"{path}: runs must be a list of mappings of keys to values")
    problems = [_describe_key(key) for key in dict.fromkeys(key for run in runs for key in run) if not _may_sweep(key)]
    if problems:
        raise UsageError("\n  ".join([f"{path}:", *problems]))
    return [{key: _to_flag(value) for key, value in run.items()} for run in runs]


def _expand_grid(path: Path, grid: Any) -> list[dict[str, Any]]:
    if (
        not isinstance(grid, dict)
        or not grid
        or not all(isinstance(values, list) and values for values in grid.values())
    ):
        raise UsageError(f"{path}: grid must map keys to lists of values, such as `learning_rate: [1e-5, 3e-5]`")
    count = 1
    for values in grid.values():
        count *= len(values)
    if count > _MAX_RUNS:
        raise UsageError(f"{path}: the grid has {count:,} combinations")
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def _may_sweep(key: object) -> bool:
    return key in all_keys() and key not in _NOT_SWEPT


def _describe_key(key: object) -> str:
    if key in _NOT_SWEPT:
        return f"{key}: can't be swept; each run gets its own folder in the recipe's output_dir"
    nearest = find_nearest(str(key), all_keys())
    return f"{key}: unknown key; " + (f"did you mean {nearest}?" if nearest else "docs/recipes.md lists the valid keys")


def _to_flag(value: object) -> str:
    """A value as the text of a flag, which the recipe parses as YAML."""
    return value if isinstance(value, str) else json.dumps(value)


def build_runs(recipe: str, sweep: Path, overrides: Mapping[str, str]) -> list[dict[str, str]]:
    """The overrides of each run, including its run directory; every run's recipe is validated.

    Args:
        overrides: for all runs; the sweep's values take precedence.

    Raises:
        RecipeError: a run's recipe is wrong; all problems of all runs at once.
        UsageError: the sweep file is wrong.
    """
    runs, problems = _list_runs(recipe, sweep, overrides), []
    for number, run in enumerate(runs):
        try:
            load_recipe(recipe, run)
        except RecipeError as error:
            problems += [f"run {number}: {problem}" for problem in error.problems]
    if problems:
        raise RecipeError(str(sweep), problems)
    return runs


def _list_runs(recipe: str, sweep: Path, overrides: Mapping[str, str]) -> list[dict[str, str]]:
    """Like `build_runs`, without validating the recipes: a task of a large array must not read all of them."""
    folder = Path(load_recipe(recipe, overrides).recipe.output_dir)
    return [
        {**overrides, **settings, "output_dir": str(name_run(folder, number))}
        for number, settings in enumerate(load_sweep(sweep))
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


def name_run(folder: Path, number: int) -> Path:
    """The run directory of one run of a sweep."""
    return folder / f"run_{number:02d}"


def build_task(arguments: Sequence[str]) -> list[str]:
    """The command of one task of the array; without --task, that of the job that compares all runs.

    Raises:
        RecipeError, UsageError: the recipe or the sweep file is wrong, there is no such task, or too few runs to compare.
    """
    task, rest = _take(list(arguments), "task")
    sweep, rest = _take(rest, "sweep")
    options = []  # Options of `onecurve run`, which are not keys of the recipe.
    for name in ("topology", "num_processes", "num-processes"):
        value, rest = _take(rest, name)
        options += [f"--{name}={value}"] if value is not None else []
    recipe, overrides = parse_arguments(rest)
    if recipe is None or sweep is None:
        raise UsageError("sbatch --array 0-N slurm/sweep.sh --config RECIPE.yaml --sweep SWEEP.yaml [--key value ...]")
    runs = _list_runs(recipe, Path(sweep), overrides)
    if task is None:
        return _build_comparison([run["output_dir"] for run in runs])
    if not task.isdigit() or int(task) >= len(runs):
        raise UsageError(f"{sweep} has {len(runs)} runs, so there is no task {task}: sbatch --array 0-{len(runs) - 1}")
    words = [f"--{key}={value}" for key, value in runs[int(task)].items()]
    return ["bash", str(find_root() / "slurm" / "finetune.sh"), f"--config={recipe}", *options, *words]


def _build_comparison(runs: Sequence[str]) -> list[str]:
    there = [run for run in runs if RunDirectory(Path(run)).config.is_file()]
    for run in sorted(set(runs) - set(there)):
        print(f"onecurve: {run} does not exist: its training has not started", file=sys.stderr)
    if len(there) < 2:
        raise UsageError(f"{len(there)} of {len(runs)} runs can be compared; see the logs of the array")
    return ["onecurve", "compare", *there]


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
