"""TRL's SFTTrainer and transformers.Trainer beside Onecurve on one global batch of a decoder, on four topologies.

    python -m benchmarks.peers           about three minutes on two idle cores; writes docs/PEERS.md
    python -m benchmarks.peers --print   writes nothing

All get the same weights and the same examples, on 1 or 2 real processes with 1 or 4 micro-batches each. The referee is plain
transformers: one example at a time, and nothing but its forward and backward.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.invariance import build_data
from benchmarks.processor import describe_machine, describe_measurement
from benchmarks.references import format_rows
from benchmarks.references_lesson import Lesson, build_lesson
from onecurve.training.config import load_recipe, parse_arguments
from onecurve.training.tasks.base import NO_TARGET

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "build" / "peers"
PAGE = ROOT / "docs" / "PEERS.md"

LESSONS: dict[str, dict[str, str]] = {
    "texts": {"text_column": "text"},
    "completions": {"prompt_column": "prompt", "completion_column": "completion"},
}
TOPOLOGIES = ((1, 1), (1, 4), (2, 1), (2, 4))  # processes, micro-batches of each
BATCH_SIZE = 16
WAYS = ("referee", "Onecurve", "Trainer", "SFTTrainer")
HEADINGS = ["topology", "way", "loss", "off by", "gradient norm", "off by"]


@dataclass(frozen=True)
class FirstStep:
    """Loss of a global batch as it is reported, and the norm of its gradient before clipping."""

    loss: float
    grad_norm: float


def build_flags(lesson: str, folder: Path, place: str = "referee", micro_batch_size: int = BATCH_SIZE) -> list[str]:
    """The recipe on a command line, with the name of its output folder."""
    recipe = {
        "task": "causal_lm",
        "model_name_or_path": str(folder / "decoder"),
        "train_file": str(folder / "train.jsonl"),
        "validation_file": str(folder / "validation.jsonl"),
        **LESSONS[lesson],
        "max_length": "128",
        "max_eval_samples": "4",
        "train_batch_size": str(BATCH_SIZE),
        "per_device_batch_size": str(micro_batch_size),
        "max_train_steps": "1",
        "resume": "never",
        "output_dir": str(folder / lesson / place),
    }
    return [word for key, value in recipe.items() for word in (f"--{key}", value)]


def referee(lesson: Lesson) -> FirstStep:
    """The first global batch with plain transformers, one example at a time, in float64."""
    import torch

    model = lesson.model.double()
    rows = [lesson.train[row] for row in lesson.batches[0]]
    num_targets = sum(label != NO_TARGET for row in rows for label in row["labels"][1:])
    loss = 0.0
    for row in rows:
        logits = model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0, :-1]
        own = torch.nn.functional.cross_entropy(
            logits, torch.tensor(row["labels"][1:]), ignore_index=NO_TARGET, reduction="sum"
        )
        (own / num_targets).backward()
        loss += float(own.detach()) / num_targets
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return FirstStep(loss, float(torch.stack([gradient.norm() for gradient in gradients]).norm()))


def run_processes(program: Sequence[str], num_processes: int) -> None:
    """Run a program with as many real processes over gloo.

    Raises:
        SystemExit: it failed; its last words are shown.
    """
    command = [sys.executable, *program]
    if num_processes > 1:
        launch = ["-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/multi_cpu.yaml"]
        command = [sys.executable, *launch, "--num_processes", str(num_processes), *program]
    threads = max(1, (os.cpu_count() or 1) // num_processes)
    variables = {"OMP_NUM_THREADS": str(threads), **os.environ, "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{result.stdout[-1000:]}{result.stderr[-4000:]}")


def run_onecurve(lesson: str, folder: Path, num_processes: int, accumulation: int) -> FirstStep:
    """training/run.py, one step."""
    place = f"onecurve_{num_processes}x{accumulation}"
    flags = build_flags(lesson, folder, place, BATCH_SIZE // (num_processes * accumulation))
    run_processes(["training/run.py", *flags], num_processes)
    line = json.loads((folder / lesson / place / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    return FirstStep(line["loss"], line["grad_norm"])


def measure(lessons: Sequence[str], folder: Path) -> dict[str, dict[tuple[int, int], dict[str, FirstStep]]]:
    """The first step of every lesson, on every topology, in every way."""
    folder.mkdir(parents=True, exist_ok=True)
    build_data(folder)
    for num_processes in (1, 2):
        program = ["-m", "benchmarks.peers_trainer", str(folder), *lessons]
        run_processes(program, num_processes)
    found: dict[str, dict[tuple[int, int], dict[str, FirstStep]]] = {}
    for lesson in lessons:
        judged = referee(build_lesson(load_recipe(*parse_arguments(build_flags(lesson, folder))).recipe))
        for num_processes, accumulation in TOPOLOGIES:
            peers = json.loads((folder / f"peers_{num_processes}.json").read_text(encoding="utf-8"))
            ways = {"referee": judged, "Onecurve": run_onecurve(lesson, folder, num_processes, accumulation)}
            ways |= {way: FirstStep(*peers[lesson][way][str(accumulation)]) for way in ("Trainer", "SFTTrainer")}
            found.setdefault(lesson, {})[num_processes, accumulation] = ways
    return found


def to_rows(found: dict[tuple[int, int], dict[str, FirstStep]]) -> list[list[str]]:
    """A row for each topology and way."""
    rows = []
    for (num_processes, accumulation), ways in found.items():
        judged = ways["referee"]
        for way, step in ways.items():
            if way == "referee":
                continue
            off = [abs(step.loss / judged.loss - 1), abs(step.grad_norm / judged.grad_norm - 1)]
            name = f"{num_processes} x {accumulation}"
            rows.append([name, way, f"{step.loss:.7f}", f"{off[0]:.1e}", f"{step.grad_norm:.7f}", f"{off[1]:.1e}"])
    rows.append(["", "referee", f"{judged.loss:.7f}", "", f"{judged.grad_norm:.7f}", ""])
    return rows


def format_page(found: dict[str, Any], machine: dict[str, Any]) -> str:
    """The text of docs/PEERS.md."""
    tables = "\n\n".join(
        f"## {name.capitalize()}\n\n{format_rows(HEADINGS, to_rows(each))}" for name, each in found.items()
    )
    return f"""# Peers on a decoder's global batch

{describe_measurement(machine, "python -m benchmarks.peers", ("trl",))}

The first step of a tiny Llama with random weights on {BATCH_SIZE} examples of very different length, on processes x
micro-batches of each: the loss that is reported and the norm of the gradient before clipping, in float32. All get the same
weights and the same tokens and targets. The referee is plain transformers in float64, one example at a time, its losses summed
and divided by the number of targets; "off by" is the relative distance from it.

{tables}

In a step of texts every token but the first of a text is a target; in one of completions those of the completion.

On a decoder all three are right on every topology, to the last digits of float32. With a classifier Trainer's gradient is
multiplied ([REFERENCES.md](REFERENCES.md)). TRL's packing is not in the table: it makes other batches of the same data, so
there is no step to compare. Onecurve's packed micro-batches, which it uses here, hold the examples of the same global batch.
"""


def main(arguments: Sequence[str]) -> None:
    """Measure, print, and write the page."""
    if list(arguments) not in ([], ["--print"]):
        raise SystemExit(f"unknown arguments {' '.join(arguments)}; there is only --print")
    found = measure(list(LESSONS), FOLDER)
    page = format_page(found, describe_machine())
    print(page)
    if not arguments:
        PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
