"""A sweep file: which recipe is trained with which values, and by which metric the trials are judged.

::

    recipe: training/recipes/demo.yaml
    metric: eval_accuracy
    strategy: random                       grid, random or tpe
    num_trials: 20                         of random and tpe; a grid has every combination, the last key fastest
    parameters:
      learning_rate: {low: 1.0e-5, high: 1.0e-3, log: true}
      train_batch_size: [16, 32]

`runs:`, a list of mappings, takes the place of `strategy` and `parameters` where the trials are to be listed one by one.
docs/sweep.md describes every key.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from onecurve.training.config import RecipeError, describe_errors, find_nearest
from onecurve.training.metric_names import is_lower_better
from onecurve.training.recipe import Integer, Number, PathText
from onecurve.training.recipe_yaml import Nodes, compose_recipe, construct_values
from onecurve.training.tasks import TASKS, find_task

# Each trial has its own run directory, and `resume` belongs to a start, not to a trial.
_NOT_SWEPT = frozenset({"output_dir", "resume"})

_EXAMPLES = "a list of values, such as [16, 32], or a range, such as {low: 1e-5, high: 1e-3, log: true}"

# More trials than any Slurm takes in one array.
_MAX_TRIALS = 1_000_000

Strategy = Literal["grid", "random", "tpe", "runs"]


class SweepKeys(BaseModel):
    """The keys of a sweep file, without its parameters and runs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: PathText = Field(min_length=1, description="the recipe; flags of the command line change it for all trials")
    metric: str = Field(min_length=1, description="a metric of the validation data, such as eval_accuracy")
    mode: Literal["min", "max"] | None = Field(
        default=None, description="whether a lower or a higher value is better; by default what the metric's name says"
    )
    strategy: Literal["grid", "random", "tpe"] | None = Field(
        default=None, description="grid takes every combination, random draws values, tpe learns from the trials before"
    )
    num_trials: Annotated[Integer, Field(ge=1, le=_MAX_TRIALS)] | None = Field(
        default=None, description="trials of random and tpe; with a higher number a sweep goes on"
    )
    seed: Annotated[Integer, Field(ge=0)] = Field(default=0, description="of the values that random and tpe draw")
    num_startup_trials: Annotated[Integer, Field(ge=1)] | None = Field(
        default=None, description="of tpe: trials that are drawn at random and run to their end; 10 by default"
    )
    prune: bool | None = Field(
        default=None,
        description="of tpe: stop a trial whose best value is worse than the median there; true by default",
    )


class _RangeKeys(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    low: Number
    high: Number
    log: bool = False


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included.

    Attributes:
        log: the logarithm is drawn evenly, so each factor of ten gets as many trials.
        is_whole: only whole numbers; both bounds are written as such.
    """

    low: float
    high: float
    log: bool = False
    is_whole: bool = False


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A sweep file, validated. Values are texts like those of the command line.

    Attributes:
        parameters: the values or the range of each key that is swept; empty where `runs` lists the trials.
    """

    path: Path
    recipe: str
    metric: str
    is_lower_better: bool
    strategy: Strategy
    num_trials: int
    seed: int = 0
    num_startup_trials: int = 10
    prunes: bool = False
    parameters: Mapping[str, tuple[str, ...] | Range] = field(default_factory=dict)
    runs: tuple[Mapping[str, str], ...] = ()

    def identify(self) -> dict[str, Any]:
        """What makes it this sweep and no other: all but the file's name and, where trials are drawn, their number."""
        left_out = {"path"} | ({"num_trials"} if self.strategy in ("random", "tpe") else set())
        return json.loads(json.dumps({key: value for key, value in asdict(self).items() if key not in left_out}))  # type: ignore[no-any-return]


def load_sweep(path: Path) -> Sweep:
    """Read and validate a sweep file.

    Raises:
        RecipeError: the file is not valid; all problems at once.
    """
    nodes = compose_recipe(str(path))
    problems: list[str] = []
    parameters = _read_parameters(nodes.pop("parameters"), problems) if "parameters" in nodes else None
    runs = _read_runs(nodes.pop("runs"), problems) if "runs" in nodes else None
    keys = _read_keys(path, nodes, problems)
    if parameters is None and runs is None:
        problems.append("parameters: is required; map each key to " + _EXAMPLES)
    if keys is not None:
        problems += _find_contradictions(keys, parameters, runs)
    if problems or keys is None:
        raise RecipeError(str(path), problems)
    strategy: Strategy = "runs" if runs is not None else (keys.strategy or "grid")
    num_combinations = 1
    for values in (parameters or {}).values():
        num_combinations *= len(values) if isinstance(values, tuple) else 1
    if strategy == "grid" and num_combinations > _MAX_TRIALS:
        raise RecipeError(str(path), [f"parameters: the grid has {num_combinations:,} combinations"])
    metric = f"eval_{keys.metric.removeprefix('eval_')}"
    return Sweep(
        path=path,
        recipe=keys.recipe,
        metric=metric,
        is_lower_better=is_lower_better(metric) if keys.mode is None else keys.mode == "min",
        strategy=strategy,
        num_trials=len(runs) if runs is not None else (keys.num_trials or num_combinations),
        seed=keys.seed,
        num_startup_trials=keys.num_startup_trials or 10,
        prunes=strategy == "tpe" and keys.prune is not False,
        parameters=parameters or {},
        runs=tuple(runs or ()),
    )


def _read_keys(path: Path, nodes: Nodes, problems: list[str]) -> SweepKeys | None:
    known = [*SweepKeys.model_fields, "parameters", "runs"]
    for key in [key for key in nodes if key not in known]:
        del nodes[key]
        nearest = find_nearest(key, known)
        problems.append(f"{key}: unknown key; " + (f"did you mean {nearest}?" if nearest else f"there are {known}"))
    try:
        return SweepKeys(**construct_values(str(path), nodes, SweepKeys))
    except ValidationError as error:
        problems += describe_errors(error, SweepKeys)
    except RecipeError as error:
        problems += error.problems
    return None


def _find_contradictions(
    keys: SweepKeys, parameters: Mapping[str, object] | None, runs: list[dict[str, str]] | None
) -> Iterator[str]:
    if runs is not None:
        if parameters is not None or keys.strategy is not None:
            yield "runs: lists every trial, so remove parameters and strategy, or remove runs"
    elif keys.strategy is None:
        yield "strategy: is required; grid, random or tpe"
    draws = keys.strategy in ("random", "tpe")
    if draws and keys.num_trials is None:
        yield f"num_trials: is required by strategy {keys.strategy}"
    for key in ("num_trials", "seed") if not draws else ():
        if key in keys.model_fields_set:
            yield f"{key}: only random and tpe read it; remove it or change the strategy"
    for key in ("num_startup_trials", "prune") if keys.strategy != "tpe" else ():
        if key in keys.model_fields_set:
            yield f"{key}: only tpe reads it; remove it or change the strategy"
    if keys.strategy == "grid" and parameters is not None:
        for key, values in parameters.items():
            if isinstance(values, Range):
                yield f"parameters: {key}: a grid needs a list of values; list them, or take strategy random or tpe"


def _read_parameters(node: yaml.Node, problems: list[str]) -> dict[str, tuple[str, ...] | Range]:
    if not isinstance(node, yaml.MappingNode) or not node.value:
        problems.append("parameters: must map keys of the recipe to " + _EXAMPLES)
        return {}
    found: dict[str, tuple[str, ...] | Range] = {}
    for key_node, value in node.value:
        key = str(key_node.value)
        problems += _refuse(key, "parameters")
        if isinstance(value, yaml.SequenceNode) and value.value:
            found[key] = texts = tuple(map(_to_flag, value.value))
            twice = {text for text in texts if texts.count(text) > 1}
            problems += [f"parameters: {key}: {text} stands twice; keep one" for text in sorted(twice)]
        elif isinstance(value, yaml.MappingNode):
            if (span := _read_range(key, value, problems)) is not None:
                found[key] = span
        else:
            problems.append(f"parameters: {key}: must be {_EXAMPLES}")
    return found


def _read_range(key: str, node: yaml.MappingNode, problems: list[str]) -> Range | None:
    values = _construct(node)
    try:
        keys = _RangeKeys(**{str(name): value for name, value in values.items()})
    except ValidationError as error:
        problems += [f"parameters: {key}: {line}" for line in describe_errors(error, _RangeKeys)]
        return None
    if keys.low >= keys.high:
        problems.append(f"parameters: {key}: low must be below high, got {keys.low:g} and {keys.high:g}")
    if keys.log and keys.low <= 0:
        problems.append(f"parameters: {key}: log needs a low above 0, got {keys.low:g}")
    return Range(keys.low, keys.high, keys.log, _is_whole(key, values))


def _is_whole(key: str, bounds: Mapping[str, Any]) -> bool:
    """Whether a range means whole numbers: its bounds are, and no task reads a fraction under that key."""
    fields = [find_task(name).recipe_class.model_fields.get(key) for name in TASKS]
    takes_fractions = any(field is not None and _holds_float(field.annotation) for field in fields)
    return not takes_fractions and all(isinstance(bounds[name], int) for name in ("low", "high"))


def _holds_float(annotation: Any) -> bool:
    return annotation is float or any(map(_holds_float, get_args(annotation)))


def _read_runs(node: yaml.Node, problems: list[str]) -> list[dict[str, str]]:
    trials = node.value if isinstance(node, yaml.SequenceNode) else []
    if not trials or not all(isinstance(trial, yaml.MappingNode) and trial.value for trial in trials):
        problems.append("runs: must be a list of mappings of keys to values, such as `- {learning_rate: 1e-5}`")
        return []
    runs = [{str(key.value): _to_flag(value) for key, value in trial.value} for trial in trials]
    for key in dict.fromkeys(key for run in runs for key in run):
        problems += _refuse(key, "runs")
    return runs


def _refuse(key: str, inside: str) -> list[str]:
    if key in _NOT_SWEPT:
        return [f"{inside}: {key}: can't be swept; each trial gets its own folder in the recipe's output_dir"]
    return []


def _to_flag(node: yaml.Node) -> str:
    """A value as the text of a flag: a scalar as it is written, anything else as JSON, which YAML reads alike."""
    return node.value if isinstance(node, yaml.ScalarNode) else json.dumps(_construct(node))


def _construct(node: yaml.Node) -> Any:
    loader = yaml.SafeLoader("")
    try:
        return loader.construct_object(node, deep=True)
    finally:
        loader.dispose()
