"""Arguments and options that several commands share, and how a command takes its options as one value."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, TypeVar, get_type_hints

import typer

from onecurve.launcher.errors import UsageError

# Options that a command does not know are keys of the recipe.
TAKES_RECIPE_KEYS = {"allow_extra_args": True, "ignore_unknown_options": True}

RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="a recipe, such as training/recipes/demo.yaml")]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="a run directory: the recipe's output_dir")]
JsonOption = Annotated[bool, typer.Option("--json", help="print one JSON object for a program")]
TopologyOption = Annotated[
    str | None, typer.Option("--topology", metavar="NAME", help="a name in accelerate_configs/, or a YAML's path")
]
ProcessesOption = Annotated[
    int | None,
    typer.Option(
        "--num_processes", "--num-processes", min=1, help="processes over all machines, instead of one per device"
    ),
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", "--dry_run", help="show the choice and the command without starting it")
]
RestartsOption = Annotated[
    int,
    typer.Option("--max-restarts", "--max_restarts", min=0, help="restarts from the last checkpoint after a crash"),
]
YesOption = Annotated[
    bool, typer.Option("--yes", help="train in bf16 although this processor is far slower in it (allow_slow_bf16)")
]
DebugOption = Annotated[bool, typer.Option("--debug", help="show tracebacks, and all output of the launched tools")]


@dataclass(frozen=True, kw_only=True)
class LaunchOptions:
    """How a training is started: the options that `run` and `resume` share."""

    topology: TopologyOption = None
    num_processes: ProcessesOption = None
    dry_run: DryRunOption = False
    as_json: JsonOption = False
    max_restarts: RestartsOption = 0
    yes: YesOption = False
    debug: DebugOption = False


@dataclass(frozen=True, kw_only=True)
class ResourceOptions:
    """What is requested of Slurm: the options that `submit` and `sweep` share."""

    nodes: Annotated[int, typer.Option("--nodes", min=1, help="machines")] = 1
    gpus_per_node: Annotated[int, typer.Option("--gpus-per-node", "--gpus_per_node", min=0, help="GPUs on each")] = 0
    cpus_per_node: Annotated[
        int | None,
        typer.Option("--cpus-per-node", "--cpus_per_node", min=1, help="cores on each; by default 4 per GPU, or 4"),
    ] = None
    time: Annotated[str | None, typer.Option("--time", help="limit of each start, such as 12:00:00")] = None
    partition: Annotated[str | None, typer.Option("--partition", help="a partition that sinfo lists")] = None
    job_name: Annotated[str | None, typer.Option("--job-name", "--job_name", help="by default onecurve")] = None
    dependency: Annotated[str | None, typer.Option("--dependency", help="such as afterok:123")] = None
    sbatch: Annotated[
        list[str] | None,
        typer.Option("--sbatch", metavar="OPTION", help="any other option of sbatch, such as --sbatch=--account=NAME"),
    ] = None


Options = TypeVar("Options")


def takes(options: type[Options]) -> Callable[[Callable[[Options], int]], Callable[..., int]]:
    """Turn a function of one dataclass into a command: typer sees each field as an argument or option."""
    hints = get_type_hints(options, include_extras=True)
    parameters = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in fields(options)  # type: ignore[arg-type] # a dataclass
    ]

    def decorate(command: Callable[[Options], int]) -> Callable[..., int]:
        def call(**values: object) -> int:
            return command(options(**values))

        call.__name__, call.__doc__, call.__annotations__ = command.__name__, command.__doc__, hints
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return call

    return decorate


def allow(overrides: Mapping[str, str], yes: bool) -> dict[str, str]:
    """The overrides, with what --yes allows."""
    return {**overrides, **({"allow_slow_bf16": "true"} if yes else {})}


def parse_keys(context: typer.Context) -> dict[str, str]:
    """The recipe's keys among the options that a command does not know.

    Raises:
        UsageError: a word looks like one of the command's own options, mistyped.
        RecipeError: a word is not a flag, or a flag has no value or is given twice.
    """
    from onecurve.training.config import all_keys, find_nearest, parse_arguments

    words = [word for each in context.command.params for word in each.opts if word.startswith("--")]
    options = {word.removeprefix("--").replace("-", "_"): word for word in words}
    for word in context.args:
        key = word.removeprefix("--").partition("=")[0].replace("-", "_")
        if word.startswith("--") and key not in (*all_keys(), "eval_only"):
            nearest = find_nearest(key, [*all_keys(), *options])
            if nearest in options:
                raise UsageError(f"{word}: unknown option; did you mean {options[nearest]}?")
    return parse_arguments(context.args)[1]
