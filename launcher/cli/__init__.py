"""`onecurve`: where a recipe runs.

    onecurve run RECIPE [--key value ...]     choose a topology, check, start and mind the training
    onecurve check [RECIPE]                   every problem before a device is held; without a recipe, of the machine
    onecurve plan RECIPE --devices 8xH100-80GB
    onecurve watch RUN, report RUN, compare RUN RUN, resume RUN, predict RUN --input FILE --output FILE

Only this module prints and exits; the others return data. Nothing heavy is imported before a subcommand needs it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from onecurve.launcher.errors import LauncherError, PreflightFailed, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from onecurve.launcher.facts.machine import Machine
    from onecurve.launcher.launching.command import Command
    from onecurve.launcher.planning.topology import Topology
    from onecurve.launcher.preflight import Finding
    from onecurve.training.config import Recipe

app = typer.Typer(
    name="onecurve",
    help="One recipe, one loss curve, any machine: start, check, plan and watch trainings.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # Its help is plain text, and answers twice as fast.
    context_settings={"help_option_names": ["-h", "--help"]},
)

# The width of "found", "chosen" and the like before what they tell.
_FACT_INDENT = 10

# Words that a subcommand does not know are the recipe's keys.
_TAKES_RECIPE_KEYS = {"allow_extra_args": True, "ignore_unknown_options": True}

RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="a recipe, such as training/recipes/demo.yaml")]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="a run directory: the recipe's output_dir")]
JsonOption = Annotated[bool, typer.Option("--json", help="print one JSON object for a program")]
TopologyOption = Annotated[
    str | None, typer.Option("--topology", metavar="NAME", help="a name in accelerate_configs/, or a YAML's path")
]
ProcessesOption = Annotated[
    int | None,
    typer.Option(
        "--num_processes", "--num-processes", min=1, help="processes over all machines, instead of one a device"
    ),
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", "--dry_run", help="show the choice and the command, start nothing")
]
RestartsOption = Annotated[
    int,
    typer.Option("--max-restarts", "--max_restarts", min=0, help="starts again from the last checkpoint after a crash"),
]
DebugOption = Annotated[bool, typer.Option("--debug", help="show tracebacks, and all that the launched tools print")]


def main() -> None:
    """Run the command line and exit with its code."""
    from onecurve.launcher.launching.command import describe_other_checkout, find_root
    from onecurve.launcher.launching.supervise import STOP_SIGNALS

    is_completing = "_ONECURVE_COMPLETE" in os.environ  # A shell that asks shows what is on stderr.
    if not is_completing and (warning := describe_other_checkout(find_root())) is not None:
        print(f"onecurve: {warning}", file=sys.stderr)
    exit_code = run_command_line(sys.argv[1:])
    # Python lets go of its handlers while it ends: a second request to stop would then replace the code of the first.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    sys.exit(exit_code)


def run_command_line(arguments: Sequence[str]) -> int:
    """Run the command line; whatever goes wrong becomes one message on stderr, and with --json an object on stdout.

    Returns:
        0, the exit code of the error (launcher/errors.py), or the training's.
    """
    command = typer.main.get_command(app)
    if not arguments:
        command.main(["--help"], prog_name="onecurve", standalone_mode=False)
        return UsageError.exit_code
    try:
        return int(command.main(list(arguments), prog_name="onecurve", standalone_mode=False) or 0)
    except Exception as error:
        if "--debug" in arguments:
            raise
        exit_code, message = _describe(error)
        print(f"onecurve: {message}", file=sys.stderr)
        if "--json" in arguments:
            problems = getattr(error, "problems", [message])
            kind = type(error).__name__
            print(json.dumps({"exit_code": exit_code, "error": kind, "message": message, "problems": problems}))
        return exit_code
    except KeyboardInterrupt:
        return 130


def _describe(error: Exception) -> tuple[int, str]:
    from onecurve.training.config import RecipeError

    if isinstance(error, LauncherError):
        return error.exit_code, str(error)
    if isinstance(error, RecipeError):
        return 2, str(error)
    if hasattr(error, "format_message"):  # typer's own errors: an unknown option, a missing argument.
        return 2, f"{error.format_message()} (onecurve --help lists what there is)"
    if isinstance(error, typer.Abort):
        return 130, "aborted"
    return 1, f"unexpected {type(error).__name__}: {error} (--debug shows where; please report it)"


def _parse_keys(context: typer.Context) -> dict[str, str]:
    """The recipe's keys among the words that a subcommand does not know.

    Raises:
        UsageError: a word is most likely one of the subcommand's own options, mistyped.
        RecipeError: a word is no flag, a flag has no value or is given twice.
    """
    from onecurve.launcher.launching.command import parse_overrides
    from onecurve.training.config import Recipe, find_nearest

    words = [word for each in context.command.params for word in each.opts if word.startswith("--")]
    options = {word.removeprefix("--").replace("-", "_"): word for word in words}
    for word in context.args:
        key = word.removeprefix("--").partition("=")[0].replace("-", "_")
        if word.startswith("--") and key not in (*Recipe.model_fields, "eval_only"):
            nearest = find_nearest(key, [*Recipe.model_fields, *options])
            if nearest in options:
                raise UsageError(f"{word}: unknown option; did you mean {options[nearest]}?")
    return parse_overrides(context.args)


# run ---------------------------------------------------------------------------------------------------------


@app.command(context_settings=_TAKES_RECIPE_KEYS)
def run(
    context: typer.Context,
    recipe: RecipeArgument,
    topology: TopologyOption = None,
    num_processes: ProcessesOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
    max_restarts: RestartsOption = 0,
    debug: DebugOption = False,
) -> int:
    """Train a recipe on the topology that suits this machine.

    Chooses, checks, starts the training and minds it; --key value overrides a recipe's key. The training's exit code
    comes back: 0 finished, 2 bad input, 3 diverged, 75 stopped with a checkpoint, 1 anything else. Ctrl-C, SIGTERM and
    SIGUSR1 ask for a checkpoint and a stop.
    """
    return _train(str(recipe), _parse_keys(context), topology, num_processes, dry_run, as_json, max_restarts, debug)


@app.command()
def resume(
    run: RunArgument,
    topology: TopologyOption = None,
    num_processes: ProcessesOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
    max_restarts: RestartsOption = 0,
    debug: DebugOption = False,
) -> int:
    """Go on with a run from its last checkpoint.

    On whatever this machine has: another number of processes or another strategy makes the same steps.
    """
    from onecurve.launcher.facts.history import check_run
    from onecurve.training.config import load_recipe

    recipe = str(check_run(run) / "config.yaml")
    overrides = {"output_dir": str(run)}
    if load_recipe(recipe).recipe.resume == "never":
        overrides["resume"] = "auto"
    return _train(recipe, overrides, topology, num_processes, dry_run, as_json, max_restarts, debug)


def _train(
    recipe_path: str,
    overrides: dict[str, str],
    topology_name: str | None,
    num_processes: int | None,
    dry_run: bool,
    as_json: bool,
    max_restarts: int,
    debug: bool,
) -> int:
    from onecurve.launcher.facts.machine import detect_machine
    from onecurve.launcher.launching.command import build_command, find_root
    from onecurve.launcher.launching.supervise import Ending, supervise, supervise_with_restarts
    from onecurve.launcher.preflight import check_recipe
    from onecurve.training.config import load_recipe

    root = find_root()
    resolved = load_recipe(recipe_path, overrides)
    machine = detect_machine()
    topology = _pick_topology(root, machine, resolved.recipe, topology_name, num_processes)
    command = build_command(root, recipe_path, overrides, topology, machine)
    findings = check_recipe(resolved.recipe, topology, machine, resolved.eval_only)
    if as_json and dry_run:
        print(json.dumps(_describe_launch(command, topology, findings), indent=2))
        return PreflightFailed.exit_code if any(finding.severity == "error" for finding in findings) else 0
    for line in topology.reasons:
        _tell(_wrap(line, _FACT_INDENT))
    (print if dry_run else _tell)(command.to_shell())
    for finding in findings:
        if finding.severity == "warning":
            _tell(f"warning: {finding.message}")
    errors = [finding.message for finding in findings if finding.severity == "error"]
    if errors:
        raise PreflightFailed(errors)
    if dry_run:
        return 0

    def start(attempt: int) -> Ending:
        # What `never` refuses is what the first start has left.
        again = command if attempt == 0 or resolved.recipe.resume != "never" else build_command(
            root, recipe_path, {**overrides, "resume": "auto"}, topology, machine
        )  # fmt: skip
        # Who watches the run learns from its status that a failure is not the end.
        variables = {**again.environment, "ONECURVE_RESTARTS_LEFT": str(max_restarts - attempt)}
        again = replace(again, environment=variables)
        return supervise(again, Path(resolved.recipe.output_dir), debug, keeps_stdout=as_json)

    ending = supervise_with_restarts(start, max_restarts, _tell)
    if ending.message:
        print(f"onecurve: {ending.message}", file=sys.stderr)
    if as_json:
        message = ending.message or ending.cause
        print(json.dumps({"exit_code": ending.exit_code, "run": resolved.recipe.output_dir, "message": message}))
    return ending.exit_code


def _wrap(line: str, indent: int) -> str:
    """The line in as many as the terminal needs, those after the first set in; a file gets one line."""
    if not sys.stderr.isatty():
        return line
    import shutil
    import textwrap

    return textwrap.fill(line, shutil.get_terminal_size().columns - 1, subsequent_indent=" " * indent)


def _tell(line: str) -> None:
    """What the launcher says of itself goes to stderr: stdout is the training's, a dry run's command or a program's JSON."""
    print(line, file=sys.stderr, flush=True)


def _pick_topology(
    root: Path, machine: Machine, recipe: Recipe, name: str | None, num_processes: int | None
) -> Topology:
    from onecurve.launcher.planning.topology import build_topology, choose_topology, count_processes

    shape, work = _read_model(recipe, machine, count_processes(machine, num_processes))
    if name is None:
        return choose_topology(root, machine, shape, work, num_processes)
    reasons = (
        f"found     {machine.describe()}", f"chosen    {name}", "because   --topology says so"
    )  # fmt: skip
    return build_topology(root, machine, name, num_processes, reasons)


def _read_model(recipe: Recipe, machine: Machine, num_processes: int) -> tuple[Any, Any]:
    from onecurve.launcher.errors import UnreadableModel
    from onecurve.launcher.facts.shape import load_shape
    from onecurve.launcher.planning.plan import build_work

    try:
        shape = load_shape(recipe.model_name_or_path, num_labels=2)
    except UnreadableModel:
        shape = None
    return shape, build_work(recipe, shape, machine.kind, recipe.max_length, num_processes)


def _describe_launch(command: Command, topology: Topology, findings: Sequence[Any]) -> dict[str, Any]:
    return {
        "topology": topology.name,
        "strategy": topology.strategy,
        "num_processes": topology.num_processes,
        "num_machines": topology.num_machines,
        "reasons": list(topology.reasons),
        "command": list(command.words),
        "environment": dict(command.environment),
        "findings": [asdict(finding) for finding in findings],
    }


# check -------------------------------------------------------------------------------------------------------


@app.command(context_settings=_TAKES_RECIPE_KEYS)
def check(
    context: typer.Context,
    recipe: Annotated[
        Path | None, typer.Argument(metavar="[RECIPE]", help="a recipe; without one, the machine")
    ] = None,
    topology: TopologyOption = None,
    num_processes: ProcessesOption = None,
    deep: Annotated[
        bool, typer.Option("--deep", help="load data, labels, tokenizer and model for real, in a process of its own")
    ] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> int:
    """Find every problem before a device is held.

    Looks at recipe, files, model, hub, memory, disk, YAML, processes, ports and packages; without a recipe it is a
    doctor of the machine. Exit code 0 if nothing stands in the way, else 2.
    """
    from onecurve.launcher.facts.machine import detect_machine
    from onecurve.launcher.launching.command import find_root
    from onecurve.launcher.launching.deep_check import check_deeply
    from onecurve.launcher.preflight import Finding, check_machine, check_recipe, describe_model
    from onecurve.training.config import RecipeError, load_recipe

    root, machine = find_root(), detect_machine()
    facts = [f"machine   {machine.describe()}"]
    if recipe is None:
        findings = check_machine(root, machine)
    else:
        overrides = _parse_keys(context)
        wrong: list[str] = []
        remainder: Recipe | None = None
        try:
            remainder = load_recipe(str(recipe), overrides).recipe
        except RecipeError as error:
            wrong, remainder = [f"{error.origin}: {problem}" for problem in error.problems], error.remainder
        findings = []
        if remainder is not None:
            chosen = None
            try:
                chosen = _pick_topology(root, machine, remainder, topology, num_processes)
                facts = list(chosen.reasons)
            except LauncherError as error:
                wrong.append(str(error))
            facts += describe_model(remainder)
            findings = check_recipe(remainder, chosen, machine)
        findings = [*(Finding("error", message) for message in wrong), *findings]
        if deep and not any(finding.severity == "error" for finding in findings):
            deep_facts, deep_findings = check_deeply(str(recipe), overrides, root)
            facts += deep_facts
            findings += deep_findings
    num_errors = sum(finding.severity == "error" for finding in findings)
    if as_json:
        print(json.dumps({"facts": facts, "findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        _print_findings(facts, findings)
    return PreflightFailed.exit_code if num_errors else 0


def _print_findings(facts: Sequence[str], findings: Sequence[Finding]) -> None:
    from onecurve.launcher.views.plan_table import print_hanging

    console = _console()
    for fact in facts:
        print_hanging(console, fact[:_FACT_INDENT], fact[_FACT_INDENT:])
    for finding in findings:
        style = "red" if finding.severity == "error" else "yellow"
        print_hanging(console, f"{finding.severity:<{_FACT_INDENT}}", finding.message, style)
    if not findings:
        console.print("nothing stands in the way", style="green")


def _console() -> Console:
    from rich.console import Console

    return Console()


# Slurm -------------------------------------------------------------------------------------------------------


@app.command(context_settings=_TAKES_RECIPE_KEYS)
def submit(
    context: typer.Context,
    recipe: RecipeArgument,
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="machines")] = 1,
    gpus_per_node: Annotated[int, typer.Option("--gpus-per-node", "--gpus_per_node", min=0, help="GPUs on each")] = 0,
    cpus_per_node: Annotated[
        int | None, typer.Option("--cpus-per-node", "--cpus_per_node", min=1, help="cores on each; 4 a GPU, or 4")
    ] = None,
    time: Annotated[str | None, typer.Option("--time", help="limit of each start, such as 12:00:00")] = None,
    partition: Annotated[str | None, typer.Option("--partition", help="a queue that sinfo lists")] = None,
    job_name: Annotated[str | None, typer.Option("--job-name", "--job_name", help="else onecurve")] = None,
    array: Annotated[Path | None, typer.Option("--array", metavar="SWEEP", help="a sweep file: one run a task")] = None,
    at_once: Annotated[int | None, typer.Option("--at-once", "--at_once", min=1, help="most tasks at a time")] = None,
    dependency: Annotated[str | None, typer.Option("--dependency", help="such as afterok:123")] = None,
    sbatch: Annotated[
        list[str] | None, typer.Option("--sbatch", metavar="OPTION", help="any other, such as --sbatch=--account=NAME")
    ] = None,
    topology: TopologyOption = None,
    num_processes: ProcessesOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", "--dry_run", help="check and print the commands, submit nothing")
    ] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> int:
    """Check everything, then send the training to Slurm; with --array a run for each setting, and their comparison."""
    # As in a job: what it needs must be here. The hub's client reads this when it is imported.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from onecurve.launcher.cluster.slurm import Request
    from onecurve.launcher.cluster.submit import submit_request
    from onecurve.launcher.launching.command import find_root

    request = Request(
        str(recipe), _parse_keys(context), nodes, gpus_per_node, cpus_per_node, time, partition, job_name,
        dependency, tuple(sbatch or ()), topology, num_processes,
    )  # fmt: skip
    submitted = submit_request(find_root(), request, array, at_once, dry_run, _tell)
    if as_json:
        print(json.dumps(asdict(submitted), indent=2))
    elif dry_run:
        print("\n".join(submitted.commands))
    else:
        print(
            f"{submitted.job_id}  once it runs: onecurve watch {submitted.runs[0]}, onecurve cancel {submitted.job_id}"
        )
    return 0


@app.command()
def cancel(
    job: Annotated[str, typer.Argument(metavar="JOB|RUN", help="a job's number, or its run directory")],
    debug: DebugOption = False,
) -> int:
    """End a Slurm job and do not queue it again. Its training writes a checkpoint if Slurm gives it the time."""
    from onecurve.launcher.cluster.slurm import cancel as cancel_job

    _tell(f"job {cancel_job(job)} is ended; submit it again to go on from its last checkpoint")
    return 0


@app.command(context_settings=_TAKES_RECIPE_KEYS)
def fetch(context: typer.Context, recipe: RecipeArgument, debug: DebugOption = False) -> int:
    """Bring a recipe's model, tokenizer and data into the caches, for jobs on machines without a network."""
    from onecurve.launcher.launching.command import find_root
    from onecurve.launcher.launching.fetch import fetch_inputs

    return fetch_inputs(str(recipe), _parse_keys(context), find_root())


# plan --------------------------------------------------------------------------------------------------------


@app.command(context_settings=_TAKES_RECIPE_KEYS)
def plan(
    context: typer.Context,
    recipe: RecipeArgument,
    devices: Annotated[
        str | None,
        typer.Option("--devices", metavar="SPEC", help="such as 8xH100-80GB, for each node; else this machine"),
    ] = None,
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="machines with these devices")] = 1,
    mfu: Annotated[
        float, typer.Option("--mfu", min=0.01, max=1.0, help="share of the devices' peak that is reached")
    ] = 0.4,  # PaLM (Chowdhery et al. 2022) reports 46 %, Llama 3 38 to 43 %.
    host_memory: Annotated[
        float | None,
        typer.Option("--host_memory", "--host-memory", metavar="GIB", help="memory of each node, for offload"),
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> int:
    """Show batches, steps, memory, time and files of a training.

    Arithmetic only, for any devices: the model's config.json is enough.
    """
    from onecurve.launcher.facts.machine import GIB, detect_machine
    from onecurve.launcher.facts.shape import load_shape
    from onecurve.launcher.planning.plan import build_plan, describe_devices, estimate_data, parse_devices
    from onecurve.launcher.views.plan_table import plan_to_json, print_plan
    from onecurve.training.config import load_recipe

    resolved = load_recipe(str(recipe), _parse_keys(context))
    machine = detect_machine()
    kind = parse_devices(devices) if devices is not None else describe_devices(machine)
    shape = load_shape(resolved.recipe.model_name_or_path, num_labels=2)
    if host_memory is not None:
        host_bytes = int(host_memory * GIB)
    elif devices is None:
        host_bytes = machine.memory_bytes
    else:
        # Not said: a GPU node usually has about twice its devices' memory (a DGX H100: 2 TB beside 640 GB).
        host_bytes = 2 * kind.memory_bytes * kind.count
    result = build_plan(resolved.recipe, shape, kind, nodes, estimate_data(resolved.recipe), mfu, host_bytes)
    if as_json:
        print(json.dumps(plan_to_json(result), indent=2))
    else:
        print_plan(_console(), result, resolved.recipe)
    return 0


# Looking back --------------------------------------------------------------------------------------------------


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN...", help="run directories")],
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> int:
    """Put runs side by side: settings that differ, metrics, cost."""
    from onecurve.launcher.facts.history import load_history
    from onecurve.launcher.views.compare import build_comparison, print_comparison

    if len(runs) < 2:
        raise UsageError("compare: give two run directories or more")
    comparison = build_comparison([load_history(run) for run in runs])
    if as_json:
        print(json.dumps(comparison, indent=2))
    else:
        print_comparison(_console(), comparison)
    return 0


@app.command()
def watch(
    run: Annotated[str, typer.Argument(metavar="RUN|JOB", help="a run directory, or the number of a job of `submit`")],
    every: Annotated[float, typer.Option("--every", min=0.2, help="seconds between looks")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="look once and return")] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> int:
    """Follow a run live: curve, rate, time left, memory; of a Slurm job also what the queue says.

    Reads the run directory only, so one that another machine writes does as well.
    """
    from onecurve.launcher.cluster.slurm import find_job
    from onecurve.launcher.views.watch import build_view, find_run_directory, follow, render, wait_for_start

    folder = find_run_directory(run)
    looks_once = as_json or once or not sys.stdout.isatty()
    if not wait_for_start(_console(), folder, 0.0 if looks_once else every):
        return 0
    if as_json:
        print(json.dumps(asdict(build_view(folder, find_job))))
    elif looks_once:
        _console().print(render(build_view(folder, find_job)))
    else:
        follow(_console(), folder, every)
    return 0


@app.command()
def report(run: RunArgument, as_json: JsonOption = False, debug: DebugOption = False) -> int:
    """Write a page of a run: RUN/report.html.

    Curves, evaluations, settings with what set them, environment and restarts, in one file without scripts.
    """
    from onecurve.launcher.views.report import write_report

    path = write_report(run)
    print(json.dumps({"report": str(path)}) if as_json else path)
    return 0


# predict -----------------------------------------------------------------------------------------------------


@app.command()
def predict(
    run: RunArgument,
    input_file: Annotated[Path, typer.Option("--input", metavar="FILE", help="CSV, TSV, JSON Lines or Parquet")],
    output_file: Annotated[Path, typer.Option("--output", metavar="FILE", help="CSV, TSV, JSON Lines or Parquet")],
    num_processes: ProcessesOption = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch_size", "--batch-size", min=1, help="else the run's per_device_batch_size")
    ] = None,
    topology: TopologyOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> int:
    """Label a file with a run's final model.

    Same rows, same order, a prediction and its probabilities added; a file of any size, on one process or many.
    """
    from onecurve.launcher.facts.data_files import FORMATS
    from onecurve.launcher.facts.history import check_run
    from onecurve.launcher.facts.machine import detect_machine
    from onecurve.launcher.launching.command import build_command, find_root
    from onecurve.launcher.launching.supervise import LABELLING, supervise
    from onecurve.launcher.planning.topology import build_topology

    check_run(run)
    if not (run / "final").is_dir():
        raise UsageError(f"{str(run)!r} has no final/: its training is not finished")
    if not input_file.is_file():
        raise UsageError(f"--input {str(input_file)!r} does not exist")
    for name, path in (("--input", input_file), ("--output", output_file)):
        if path.suffix.lower() not in FORMATS:
            raise UsageError(f"{name} {str(path)!r} is none of {', '.join(FORMATS)}")
    if output_file.absolute() == input_file.absolute():
        raise UsageError("--output would overwrite --input; give another file")
    root, machine = find_root(), detect_machine()
    if topology is None:
        name = {"cuda": "multi_gpu" if len(machine.devices) > 1 else "single_gpu", "mps": "single_gpu", "cpu": "cpu"}[
            machine.kind
        ]
        topology = "multi_cpu" if name == "cpu" and (num_processes or 1) > 1 else name
    chosen = build_topology(root, machine, topology, num_processes)
    overrides = {"input": str(input_file), "output": str(output_file)}
    if batch_size is not None:
        overrides["batch_size"] = str(batch_size)
    command = build_command(root, str(run), overrides, chosen, machine, script="predict.py", recipe_flag="--run")
    if as_json and dry_run:
        print(json.dumps(_describe_launch(command, chosen, ()), indent=2))
        return 0
    (print if dry_run else _tell)(command.to_shell())
    if dry_run:
        return 0
    ending = supervise(command, None, debug, LABELLING, keeps_stdout=as_json)
    if ending.message:
        print(f"onecurve: {ending.message}", file=sys.stderr)
    if as_json:
        message = ending.message or ending.cause
        print(json.dumps({"exit_code": ending.exit_code, "output": str(output_file), "message": message}))
    return ending.exit_code


if __name__ == "__main__":
    main()
