"""`onecurve init DATA`: look at data, say which task it is for and why, and write a recipe to begin with."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from onecurve.launcher.cli.options import DebugOption, JsonOption, parse_keys, takes
from onecurve.launcher.errors import UsageError

if TYPE_CHECKING:
    from onecurve.launcher.starting.beginning import Beginning


@dataclass(frozen=True, kw_only=True)
class InitOptions:
    """The command line of `onecurve init`."""

    context: typer.Context
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="CSV, TSV, JSON Lines, Parquet or CoNLL; a folder of such files or of images; a save_to_disk folder, a hub name",
        ),
    ]
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="NAME", help="a model folder or hub name; by default one of the task's"),
    ] = None
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="RECIPE", help="the recipe to write; by default the data's name.yaml"),
    ] = None
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a recipe that exists")] = False
    as_json: JsonOption = False
    debug: DebugOption = False


@takes(InitOptions)
def init(options: InitOptions) -> int:
    """Look at data, say which task it is for and why, and write a recipe to begin with.

    Nothing is asked. --task and any other key of a recipe overrule what is found. Exit code 2 where the data does not say
    what it is for: then every way to read it is listed, with the flags that decide.
    """
    from onecurve.launcher.facts.machine import detect_machine
    from onecurve.launcher.starting.beginning import begin
    from onecurve.launcher.starting.data import find_data

    files = [options.data, *itertools.takewhile(lambda word: not word.startswith("--"), options.context.args)]
    options.context.args = options.context.args[len(files) - 1 :]  # A pattern that the shell has expanded.
    flags = parse_keys(options.context)
    if named := [key for key in ("train_file", "dataset_name") if key in flags]:
        raise UsageError(f"--{named[0]}: DATA names what to train on; leave it out")
    if options.model is not None:
        if "model_name_or_path" in flags:
            raise UsageError("--model and --model_name_or_path name the same; give one of them")
        flags["model_name_or_path"] = options.model
    _check_output(options.output, options.overwrite)
    data = find_data(files, flags.get("dataset_config_name"))
    path = options.output or Path(f"{data.name}.yaml")
    _check_output(path, options.overwrite)
    words = [*files, *(["--model", options.model] if options.model else []), *options.context.args]
    beginning = begin(data, flags, detect_machine(), path, words)
    beginning.write()
    if options.as_json:
        print(json.dumps(beginning.to_json(), indent=2))
    else:
        _print(beginning)
    return 0


def _check_output(path: Path | None, overwrite: bool) -> None:
    """Refuse a recipe that can't be written, before the data is read.

    Raises:
        UsageError: it exists, or is no YAML file.
    """
    if path is None:
        return
    if path.suffix.lower() not in (".yaml", ".yml"):
        raise UsageError(f"--output {str(path)!r} is no recipe; name it .yaml")
    if path.is_dir() or (path.exists() and not overwrite):
        raise UsageError(f"{str(path)!r} exists; name another one with --output, or replace it with --overwrite")


def _print(beginning: Beginning) -> None:
    from rich.console import Console

    from onecurve.launcher.views.terminal import LABEL_WIDTH, print_hanging

    console = Console()
    for word, text in beginning.lines:
        style = {"task": "green", "note": "yellow"}.get(word, "")
        print_hanging(console, f"{word:<{LABEL_WIDTH}}", text, style)
    print_hanging(console, f"{'written':<{LABEL_WIDTH}}", str(beginning.path))
    console.print("then", *(f"  {command}" for command in beginning.commands), sep="\n", markup=False, highlight=False,
                  soft_wrap=True)  # fmt: skip
