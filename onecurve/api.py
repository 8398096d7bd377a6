"""The public functions, for notebooks and scripts. Each runs the command of its name in a process of its own.

So a call does what `onecurve run`, `predict` or `plan` does: the same checks, messages and numbers, on one process or many.
A crash or too little memory there leaves the caller alive, and nothing stays on a device afterwards.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onecurve.launcher.facts.history import History
    from onecurve.training.config import Recipe

Row = dict[str, Any]
PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class Run:
    """A training's run directory. Its files are read at each access, so a training that is still running can be watched."""

    path: Path

    @property
    def status(self) -> Row:
        """state (running, finished, preempted or failed), exit_code, step, message."""
        return self._read().status

    @property
    def config(self) -> Row:
        """Every key of the recipe with the value that was used."""
        return self._read().settings

    @property
    def metrics(self) -> list[Row]:
        """A row for each step: step, epoch, loss, learning_rate, grad_norm, ... `pandas.DataFrame(run.metrics)` takes it."""
        return self._read().steps

    @property
    def evaluations(self) -> list[Row]:
        """A row for each evaluation on the validation data: step, eval_loss, and the task's metrics."""
        return self._read().evaluations

    def evaluate(self, test_file: PathLike | None = None, **options: Any) -> dict[str, float]:
        """As `onecurve.evaluate`."""
        return evaluate(self, test_file, **options)

    def predict(self, rows: Iterable[str | Mapping[str, Any]] | PathLike, **options: Any) -> list[Row]:
        """As `onecurve.predict`."""
        return predict(self, rows, **options)

    def _read(self) -> History:
        from onecurve.launcher.facts.history import load_history

        return load_history(self.path)


def load_run(path: PathLike) -> Run:
    """The run in a directory, finished or not.

    Raises:
        NotARun: no training has written there.
    """
    from onecurve.launcher.facts.history import check_run

    return Run(check_run(Path(path)).path)


def train(
    recipe: PathLike | None = None, *, topology: str | None = None, num_processes: int | None = None, **keys: Any
) -> Run:
    """Train a recipe, or go on with one that was interrupted; what the training prints appears on sys.stdout.

    Args:
        recipe: a YAML file; None if the keys say everything.
        topology: a name in accelerate_configs/ or a YAML file; None chooses what suits this machine.
        num_processes: processes to start; None for one a device, or one on a machine without a GPU.
        keys: recipe keys that override the file's (docs/recipes.md).

    Raises:
        RecipeError: the recipe is wrong; all problems at once.
        PreflightFailed, UnknownTopology, Unsuitable: found before anything was started.
        BadInput: data, model or machine can't do what the recipe asks.
        Diverged: the loss is not a number any more.
        Preempted: asked to stop, such as by an interrupt of the notebook; the same call goes on from the checkpoint.
        Fault: the training crashed.
    """
    output_dir = _load_recipe(recipe, keys).output_dir
    with _as_file(recipe) as path:
        _run_command(["run", path, *_to_flags(keys), *_to_options(topology=topology, num_processes=num_processes)])
    return load_run(output_dir)


def evaluate(
    run: Run | PathLike,
    test_file: PathLike | None = None,
    *,
    topology: str | None = None,
    num_processes: int | None = None,
    **keys: Any,
) -> dict[str, float]:
    """Evaluate a finished run's final model; the predictions and the report lie in its directory afterwards.

    Args:
        test_file: labelled data; None takes the recipe's test_file, or else its validation data.
        keys: recipe keys for this evaluation, such as per_device_batch_size.

    Returns:
        "test_loss", "test_accuracy", ... or, of the validation data, "eval_loss", "eval_accuracy", ...

    Raises: as `train`.
    """
    run = _find_finished(run)
    keys |= {"output_dir": run.path} | ({"test_file": test_file} if test_file is not None else {})
    config = str(run.path / "config.yaml")
    report = "test_report.json" if _load_recipe(config, keys).test_file else "eval_report.json"
    options = _to_options(topology=topology, num_processes=num_processes)
    _run_command(["run", config, *_to_flags(keys), *options, "--eval_only"])
    metrics: dict[str, float] = json.loads((run.path / report).read_text(encoding="utf-8"))["metrics"]
    return metrics


def predict(
    run: Run | PathLike,
    rows: Iterable[str | Mapping[str, Any]] | PathLike,
    *,
    topology: str | None = None,
    num_processes: int | None = None,
    batch_size: int | None = None,
    checkpoint: str | int | None = None,
) -> list[Row]:
    """Label rows with a finished run's final model, or with one of a run's checkpoints.

    Args:
        rows: texts; or rows with the recipe's text columns, as dicts or a data frame; or the path of a data file.
        batch_size: most rows that go through the model at once; None takes the run's per_device_batch_size.
        checkpoint: "best", or a checkpoint's name or step; None takes final/.

    Returns:
        The same rows in the same order, with prediction, and for classes score and the probability of each.

    Raises:
        BadInput: a row can't be labelled; the message names it.
        UsageError: the run has no such model, or the file does not exist.
    """
    run = _find_finished(run) if checkpoint is None else run if isinstance(run, Run) else load_run(run)
    frame: Any = rows
    if hasattr(frame, "columns"):  # Iterating over a data frame gives the names of its columns.
        rows = frame.to_dict("records")
    with tempfile.TemporaryDirectory(prefix="onecurve-") as folder:
        source, target = Path(folder) / "rows.jsonl", Path(folder) / "predictions.jsonl"
        if isinstance(rows, str | os.PathLike):
            source = Path(rows)
        else:
            column = _find_input_column(run)
            table = [{column: row} if isinstance(row, str) else dict(row) for row in rows]
            if not table:
                return []
            source.write_text("".join(json.dumps(row) + "\n" for row in table), encoding="utf-8")
        options = _to_options(
            topology=topology, num_processes=num_processes, batch_size=batch_size, checkpoint=checkpoint
        )
        _run_command(
            ["predict", str(run.path), "--input", str(source), "--output", str(target), *options], shows_output=False
        )
        return [json.loads(line) for line in target.read_text(encoding="utf-8").split("\n") if line]


def plan(
    recipe: PathLike | None = None,
    *,
    devices: str | None = None,
    nodes: int | None = None,
    mfu: float | None = None,
    host_memory: float | None = None,
    **keys: Any,
) -> Row:
    """Batches, steps, memory, time and files of a training, by arithmetic alone: what `onecurve plan --json` prints.

    Args:
        devices: such as "8xH100-80GB", for each node; None takes this machine's.
        mfu: share of the devices' peak that is reached, 0 to 1.
        host_memory: memory of each node in GiB.
        keys: recipe keys that override the file's.

    Raises:
        RecipeError: the recipe is wrong.
        UnreadableModel: the model has no config.json to do arithmetic with.
    """
    _load_recipe(recipe, keys)
    options = _to_options(devices=devices, nodes=nodes, mfu=mfu, host_memory=host_memory)
    with _as_file(recipe) as path:
        return _run_command(["plan", path, *_to_flags(keys), *options], shows_output=False)


def _find_input_column(run: Run) -> str:
    """The column that a row holds which is a text alone: the first one that the run's task reads."""
    from onecurve.launcher.facts.recipes import find_columns, load_recipe
    from onecurve.training.run_directory import RunDirectory

    recipe = load_recipe(str(RunDirectory(run.path).config)).recipe
    return next(iter(find_columns(recipe, with_targets=False).values()))[0]


def _run_command(words: list[str], shows_output: bool = True) -> Row:
    from onecurve.process import run_command

    return run_command(words, shows_output)


def _load_recipe(recipe: PathLike | None, keys: Mapping[str, Any]) -> Recipe:
    from onecurve.training.config import RecipeError, load_recipe

    try:
        return load_recipe(None if recipe is None else str(recipe), _to_text(keys)).recipe
    except RecipeError as error:
        if recipe is not None:
            raise
        raise RecipeError("the arguments", error.problems, error.remainder) from None


@contextmanager
def _as_file(recipe: PathLike | None) -> Iterator[str]:
    """The recipe's path; an empty file where the keys say everything."""
    if recipe is not None:
        yield str(recipe)
        return
    with tempfile.NamedTemporaryFile(prefix="onecurve-", suffix=".yaml") as file:
        yield file.name


def _find_finished(run: Run | PathLike) -> Run:
    from onecurve.launcher.errors import UsageError

    found = run if isinstance(run, Run) else load_run(run)
    if not (found.path / "final").is_dir():
        raise UsageError(f"{str(found.path)!r} has no final/: its training is not finished")
    return found


def _to_text(keys: Mapping[str, Any]) -> dict[str, str]:
    """Recipe keys as they are written on the command line."""
    return {
        key: os.fspath(value) if isinstance(value, str | os.PathLike) else json.dumps(value, default=str)
        for key, value in keys.items()
    }


def _to_flags(keys: Mapping[str, Any]) -> list[str]:
    return [f"--{key}={text}" for key, text in _to_text(keys).items()]


def _to_options(**options: object) -> list[str]:
    return [f"--{name}={value}" for name, value in options.items() if value is not None]
