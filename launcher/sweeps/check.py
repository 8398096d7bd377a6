"""Looks at every trial of a sweep before any is started: keys, values, the metric, and the files that they name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from onecurve.launcher.errors import PreflightFailed, UsageError
from onecurve.launcher.facts.recipes import list_task_metrics, load_recipe
from onecurve.launcher.preflight import check_inputs
from onecurve.launcher.sweeps.settings import list_probes, list_settings
from onecurve.launcher.sweeps.sweep_file import Sweep
from onecurve.launcher.sweeps.tpe import check_optuna
from onecurve.launcher.sweeps.trials import Trial, name_run
from onecurve.training.config import Recipe, RecipeError, find_nearest


def find_folder(sweep: Sweep, overrides: Mapping[str, str]) -> Path:
    """The folder of the run directories: the recipe's output_dir.

    Raises:
        RecipeError: the recipe is wrong.
        UsageError: the command line changes what the sweep does.
    """
    if "eval_only" in overrides:
        raise UsageError(
            "--eval_only: a sweep trains; to evaluate one of its models, use onecurve run with that output_dir"
        )
    swept = set(sweep.parameters) | {key for run in sweep.runs for key in run}
    twice = [key for key in overrides if key in swept]
    if twice:
        raise UsageError(f"--{twice[0]}: {sweep.path} has values for it; remove the flag, or the key in the file")
    return Path(load_recipe(sweep.recipe, overrides).recipe.output_dir)


def check_sweep(sweep: Sweep, overrides: Mapping[str, str], folder: Path, trials: Sequence[Trial] = ()) -> list[str]:
    """Check the recipe of every trial, and what it names; returns warnings.

    Of tpe, whose trials are not known before, each value of a list and each bound of a range is tried.

    Args:
        trials: those that were begun already.

    Raises:
        RecipeError: a value is wrong; all problems at once.
        PreflightFailed: model, data or run directories have errors; all of them.
        Unsuitable: the sweep needs a package that is not installed.
    """
    if sweep.strategy == "tpe":
        check_optuna()
    points = [
        {**settings, "output_dir": str(name_run(folder, number))} for number, settings in _list_points(sweep, trials)
    ]
    recipes = _load_recipes(sweep, [{**overrides, **point} for point in points])
    _check_metric(sweep, {**overrides, **points[0]})
    findings = [finding for recipe in recipes for finding in check_inputs(recipe)]
    errors = list(dict.fromkeys(finding.message for finding in findings if finding.severity == "error"))
    if errors:
        raise PreflightFailed(errors)
    return list(dict.fromkeys(finding.message for finding in findings))


def _list_points(sweep: Sweep, trials: Sequence[Trial]) -> list[tuple[int, Mapping[str, str]]]:
    """Settings that are known, each with the number of a trial; of tpe's probes, with that of the next one."""
    begun: list[tuple[int, Mapping[str, str]]] = [(trial.number, trial.settings) for trial in trials]
    if sweep.strategy == "tpe":
        return begun + [(len(trials), settings) for settings in list_probes(sweep)]
    return list(enumerate(list_settings(sweep)))


def _load_recipes(sweep: Sweep, points: Sequence[Mapping[str, str]]) -> list[Recipe]:
    recipes, problems = [], dict[str, int]()
    for point in points:
        try:
            recipes.append(load_recipe(sweep.recipe, point).recipe)
        except RecipeError as error:
            for problem in error.problems:
                problems[problem] = problems.get(problem, 0) + 1
    if problems:
        raise RecipeError(
            str(sweep.path),
            [
                problem if count == len(points) else f"{problem} (in {count} of {len(points)} settings)"
                for problem, count in problems.items()
            ],
        )
    return recipes


def _check_metric(sweep: Sweep, overrides: Mapping[str, str]) -> None:
    name = sweep.metric.removeprefix("eval_")
    if name == "loss":
        return
    names = list_task_metrics(sweep.recipe, overrides)
    if name not in names:
        nearest = find_nearest(name, names)
        hint = f"; did you mean eval_{nearest}?" if nearest else ""
        there = ", ".join(f"eval_{each}" for each in names)
        raise RecipeError(str(sweep.path), [f"metric: {sweep.metric} is not measured; there are {there}{hint}"])
