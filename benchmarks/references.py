"""The tutorial's three ways and Onecurve side by side, and transformers.Trainer's fault reproduced: `make references`.

    python -m benchmarks.references           about seven minutes on two idle cores; writes docs/REFERENCES.md
    python -m benchmarks.references --quick   a few short steps, to try the command itself; writes nothing

Every training is a process of its own, started as a user would start it. All are fed the same weights, and the same
examples in the same steps (references_lesson.py).
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.references_lesson import Learned, largest_deviation
from tools.launches import build_arguments, build_environment, launch_for_real

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "build" / "references"
PAGE = ROOT / "docs" / "REFERENCES.md"

RECIPE = ["--config", "training/recipes/demo.yaml", "--dropout", "0"]
QUICK = ["--max_length", "32", "--max_train_steps", "4", "--max_eval_samples", "32"]

WAYS = {
    "Trainer": ["-m", "benchmarks.references_trainer"],
    "Keras": ["-m", "benchmarks.references_keras"],
    "native PyTorch": ["-m", "benchmarks.references_native"],
    "Onecurve": ["training/run.py"],
}

# The norms of a few steps show a factor as well as those of many.
FAULT_STEPS = 3
FAULT_RECIPE = [*RECIPE, "--max_train_steps", str(FAULT_STEPS), "--max_eval_samples", "16", "--train_batch_size", "16"]
Topology = tuple[int, int]  # processes, accumulation
TOPOLOGIES: dict[Topology, int] = {(1, 1): 16, (1, 4): 4, (2, 1): 8, (2, 4): 2}  # and the examples of a micro-batch
FAULT_SCRIPTS = {"Trainer": ("benchmarks/references_trainer.py",), "Onecurve": ("training/run.py", "--resume", "never")}
Launch = Callable[[Sequence[str], Mapping[str, str]], "subprocess.CompletedProcess[str]"]


@dataclass(frozen=True)
class Measured:
    """A training and the seconds of its whole process, start to exit."""

    learned: Learned
    seconds: float


def run_training(way: str, flags: Sequence[str], folder: Path) -> Measured:
    """Run one training to its end and read what it left behind.

    Raises:
        SystemExit: it failed; its last words are shown.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, *WAYS[way], *flags, "--output_dir", str(folder)]
    if way == "Onecurve":
        command += ["--resume", "never"]
    # Threads that wait sleep: spinning on a busy machine, they would measure its other work (4 times slower, seen).
    variables = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count() or 1), "OMP_WAIT_POLICY": "PASSIVE"}
    started = time.perf_counter()
    result = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    return Measured(_read(way, folder, result), seconds)


def _read(way: str, folder: Path, result: subprocess.CompletedProcess[str]) -> Learned:
    if result.returncode:
        raise SystemExit(f"{way} failed ({' '.join(result.args)}):\n{result.stdout[-2000:]}{result.stderr[-4000:]}")
    return Learned.load_onecurve(folder) if way == "Onecurve" else Learned.load(folder)


def compare_ways(flags: Sequence[str], folder: Path, console: Console) -> dict[str, Measured]:
    """Train the demo in each way."""
    measured = {}
    for way in WAYS:
        with console.status(f"{way} on the demo"):
            measured[way] = run_training(way, flags, folder / way.replace(" ", "_"))
    return measured


def reproduce_fault(
    flags: Sequence[str], folder: Path, console: Console, launch: Launch = launch_for_real
) -> dict[Topology, dict[str, Learned]]:
    """Make the first steps of Trainer and Onecurve on four topologies, each by `accelerate launch`."""
    found: dict[Topology, dict[str, Learned]] = {}
    for (num_processes, accumulation), micro_batch_size in TOPOLOGIES.items():
        sized = [*flags, "--per_device_batch_size", str(micro_batch_size)]
        for way, (script, *options) in FAULT_SCRIPTS.items():
            place = folder / f"{way}_{num_processes}x{accumulation}"
            place.mkdir(parents=True, exist_ok=True)
            topology = "cpu" if num_processes == 1 else "multi_cpu"
            words = [*sized, *options, "--output_dir", str(place)]
            words = build_arguments(topology, num_processes, (), script, words)
            with console.status(f"{way} on {num_processes} processes, {accumulation} accumulated"):
                learned = _read(way, place, launch(words, build_environment()))
            found.setdefault((num_processes, accumulation), {})[way] = learned
    return found


def to_way_rows(measured: Mapping[str, Measured]) -> list[list[str]]:
    """A row of the first table for each way."""
    ours = measured["Onecurve"].learned
    return [
        [
            way,
            f"{found.learned.accuracy:.4f}",
            f"{found.learned.losses[-1]:.6f}",
            f"{largest_deviation(found.learned.losses, ours.losses):.1e}" if way != "Onecurve" else "",
            f"{found.learned.train_seconds:.0f}",
            f"{found.seconds:.0f}",
        ]
        for way, found in measured.items()
    ]


def to_fault_rows(found: Mapping[Topology, Mapping[str, Learned]]) -> list[list[str]]:
    """A row of the second table for each topology."""
    rows = []
    for topology, ways in found.items():
        row = [f"{topology[0]} x {topology[1]}"]
        for way, learned in ways.items():
            factor = learned.grad_norms[0] / found[1, 1][way].grad_norms[0]
            row += [f"{learned.losses[0]:.4f}", f"{learned.grad_norms[0]:.4f} x{factor:.2f}"]
        rows.append([*row, f"{largest_deviation(ways['Onecurve'].grad_norms, found[1, 1]['Onecurve'].grad_norms):.1e}"])
    return rows


WAY_HEADINGS = ["way", "accuracy", "last loss", "deviation", "seconds of training", "seconds in all"]
FAULT_TITLE = "First step, global batch of 16, on processes x accumulation"
FAULT_HEADINGS = ["topology", "Trainer loss", "Trainer norm", "Onecurve loss", "Onecurve norm", "deviation"]


def build_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table for the screen; numbers to the right."""
    table = Table(title=title, title_justify="left")
    for number, heading in enumerate(headings):
        table.add_column(heading.replace(" ", "\n", 1), justify="left" if number == 0 else "right", no_wrap=number == 0)
    for row in rows:
        table.add_row(*row)
    return table


def format_rows(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same table in Markdown."""
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def format_page(ways: Sequence[Sequence[str]], fault: Sequence[Sequence[str]], load: float) -> str:
    """The text of docs/REFERENCES.md; `load` is the machine's load average before the first training."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "accelerate", "keras"))
    return f"""# References

`make references` wrote this page. It trains the demo (all-MiniLM-L6-v2 sorts BBC news into five sections, one epoch,
batch 16, float32, dropout 0, AdamW, clipping, linear schedule) in the three ways of the transformers tutorial and with
Onecurve, each in a process of its own, all from the same weights and with the same examples in the same steps.

Measured with {packages}, Python {platform.python_version()}, on {os.cpu_count()} CPU cores
whose load average was {load:.1f} before it began.

## The tutorial's three ways and Onecurve

{format_rows(WAY_HEADINGS, ways)}

The deviation is that of a step's loss from Onecurve's, relative, the largest of all steps. Seconds of training are those
of the loop; seconds in all are those of the process, with imports, evaluation and what each saves. They are one run's:
differences of a tenth mean nothing, and on a machine with other work larger ones mean nothing either. The table is about
the curves, not about speed: all four are given Onecurve's batches of near-equal length.

The way through Keras is `compile` and `fit` over the same PyTorch weights (`TorchModuleWrapper`, torch backend). Keras's
AdamW differs from PyTorch's in one place: PyTorch adds epsilon to sqrt(v / (1 - beta2^t)), Keras to sqrt(v). A callback
sets Keras's epsilon to epsilon x sqrt(1 - beta2^t) before step t, which makes the two the same. A trace remains: to
clip, Keras multiplies by limit / norm, PyTorch by limit / (norm + 1e-6).

## Trainer's gradient depends on the topology

The same 16 examples in the first step, from the same weights, on processes x accumulation: the loss that is logged, the
gradient norm before clipping, and its ratio to the norm on one process without accumulation.

{format_rows(FAULT_HEADINGS, fault)}

`transformers.Trainer` multiplies a sequence classifier's gradient by accumulation x processes
(huggingface/transformers issue 47688). It takes every model whose `forward` has `**kwargs` for one that divides its loss by
`num_items_in_batch`; so it multiplies by the number of processes and does not divide by the number of micro-batches.
`BertForSequenceClassification` has `**kwargs` and takes the mean of its micro-batch. What follows: the logged loss is as
wrong as the gradient, and clipping at 1.0 acts on one topology and not on another. AdamW, which divides a constant
factor out, hides much of the rest; SGD would take steps that many times longer.

Onecurve divides a sum of losses by the count of the whole step. The deviation is its norm's largest, relative, from
one process without accumulation over {FAULT_STEPS} steps; `docs/INVARIANCE.md` has more of them.

`tests/reference` holds what this page shows: losses of the native loop and of Trainer within 1e-5 of Onecurve's at every
step, Keras's within 1e-4, and the factors of Trainer.
"""


def main(arguments: Sequence[str]) -> None:
    """Measure, print, and write the page."""
    is_quick = list(arguments) == ["--quick"]
    if arguments and not is_quick:
        raise SystemExit(f"unknown arguments {' '.join(arguments)}; there is only --quick")
    console = Console()
    started, load = time.perf_counter(), os.getloadavg()[0]
    ways = to_way_rows(compare_ways([*RECIPE, *QUICK] if is_quick else RECIPE, FOLDER, console))
    console.print(build_table("Same weights, same examples in each step", WAY_HEADINGS, ways))
    fault_flags = [*FAULT_RECIPE, "--max_length", "32"] if is_quick else FAULT_RECIPE
    fault = to_fault_rows(reproduce_fault(fault_flags, FOLDER, console))
    console.print(build_table(FAULT_TITLE, FAULT_HEADINGS, fault))
    if not is_quick:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(format_page(ways, fault, load), encoding="utf-8")
        console.print(f"Written to {PAGE.relative_to(ROOT)}")
    console.print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
