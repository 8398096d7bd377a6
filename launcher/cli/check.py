"""`onecurve check [RECIPE]`: all problems at once, before a training starts; without a recipe, problems of the machine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from onecurve.launcher.cli.options import (
    DebugOption,
    JsonOption,
    ProcessesOption,
    TopologyOption,
    YesOption,
    allow,
    parse_keys,
    takes,
)
from onecurve.launcher.errors import LauncherError, PreflightFailed

if TYPE_CHECKING:
    from onecurve.launcher.facts.machine import Machine
    from onecurve.launcher.preflight.findings import Finding
    from onecurve.launcher.preflight.preparation import Example
    from onecurve.training.config import Recipe


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """The command line of `onecurve check`."""

    context: typer.Context
    recipe: Annotated[Path | None, typer.Argument(metavar="[RECIPE]", help="a recipe; without one, the machine")] = None
    topology: TopologyOption = None
    num_processes: ProcessesOption = None
    deep: Annotated[bool, typer.Option("--deep", help="also load data, tokenizer and model, as a training does")] = (
        False
    )
    yes: YesOption = False
    as_json: JsonOption = False
    debug: DebugOption = False


@takes(CheckOptions)
def check(options: CheckOptions) -> int:
    """Find all problems before a training starts.

    Looks at recipe, files, model, hub, memory, disk, YAML, processes, ports and packages; without a recipe it checks
    the machine and the installation. Exit code 0 without errors, else 2.
    """
    from onecurve.launcher.facts.machine import detect_machine
    from onecurve.launcher.launching.command import find_root
    from onecurve.launcher.preflight import check_machine

    root, machine = find_root(), detect_machine()
    if options.recipe is None:
        facts, findings, example = [f"machine   {machine.describe()}"], check_machine(root, machine), None
    else:
        facts, findings, example = _check_recipe(root, machine, str(options.recipe), options)
    if options.as_json:
        content: dict[str, Any] = {"facts": facts, "findings": [asdict(finding) for finding in findings]}
        if example is not None:
            content["example"] = [{"text": text, "is_target": is_target} for text, is_target in example]
        print(json.dumps(content, indent=2))
    else:
        _print_findings(facts, findings, example)
    return PreflightFailed.exit_code if _has_errors(findings) else 0


def _check_recipe(
    root: Path, machine: Machine, recipe_path: str, options: CheckOptions
) -> tuple[list[str], list[Finding], Example | None]:
    """Facts, findings and an example; what can be checked beside a wrong key or topology is checked too."""
    from onecurve.launcher.facts.recipes import load_recipe
    from onecurve.launcher.planning.choice import pick_topology
    from onecurve.launcher.preflight import check_recipe
    from onecurve.launcher.preflight.findings import Finding
    from onecurve.launcher.preflight.model import describe_model
    from onecurve.launcher.preflight.precision import check_bf16_speed
    from onecurve.launcher.preflight.preparation import check_preparation
    from onecurve.training.config import RecipeError

    overrides = allow(parse_keys(options.context), options.yes)
    facts = [f"machine   {machine.describe()}"]
    findings: list[Finding] = []
    example: Example | None = None
    recipe: Recipe | None
    try:
        recipe = load_recipe(recipe_path, overrides).recipe
    except RecipeError as error:
        findings += [Finding("error", f"{error.origin}: {problem}") for problem in error.problems]
        recipe = error.remainder
    if recipe is not None:
        topology = None
        try:
            topology = pick_topology(root, machine, recipe, options.topology, options.num_processes)
            facts = list(topology.reasons)
        except LauncherError as error:
            findings.append(Finding("error", str(error)))
        facts += describe_model(recipe)
        findings += check_recipe(recipe, topology, machine)
        if topology is not None:
            speed_facts, speed_findings = check_bf16_speed(recipe, topology)
            facts += speed_facts
            findings += speed_findings
    if options.deep and not _has_errors(findings):
        deep_facts, deep_findings, example = check_preparation(recipe_path, overrides, root)
        facts += deep_facts
        findings += deep_findings
    return facts, findings, example


def _has_errors(findings: Sequence[Finding]) -> bool:
    return any(finding.severity == "error" for finding in findings)


def _print_findings(facts: Sequence[str], findings: Sequence[Finding], example: Example | None) -> None:
    from rich.console import Console

    from onecurve.launcher.views.example import format_example
    from onecurve.launcher.views.terminal import LABEL_WIDTH, print_hanging

    console = Console()
    for fact in facts:
        print_hanging(console, fact[:LABEL_WIDTH], fact[LABEL_WIDTH:])
    if example is not None:
        console.print("example   what is learned is green, in brackets:", highlight=False, soft_wrap=True)
        console.print(format_example(example), soft_wrap=True)
    for finding in findings:
        style = "red" if finding.severity == "error" else "yellow"
        print_hanging(console, f"{finding.severity:<{LABEL_WIDTH}}", finding.message, style)
    if not findings:
        console.print("No problems found.", style="green")
