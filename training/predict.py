"""Label a file with a trained model: the same rows in the same order, a prediction and its probabilities added.

    accelerate launch training/predict.py --run runs/demo --input texts.jsonl --output labelled.jsonl

`onecurve predict` runs it. A folder of images is read as a file with a row for each. The rows are read twice: first all are
checked, then they are labelled. They stream through in chunks, so a file may be larger than memory. Chunk i belongs to process
i mod P, and its micro-batches depend on nothing else, so any number of processes writes the same bytes.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

if __name__ == "__main__":
    # This file's own checkout or wheel, whatever else is installed; and not this folder, whose names are not for all.
    sys.path[0] = next(str(folder) for folder in Path(__file__).resolve().parents if (folder / "onecurve").is_dir())

from onecurve.training.outcome import Outcome, end_process, report_outcome  # isort: split

import numpy as np
import pyarrow as pa
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, send_to_device
from numpy.typing import NDArray

from onecurve.training import launch_protocol
from onecurve.training.config import Recipe, load_recipe, parse_arguments
from onecurve.training.data.layout import Collator
from onecurve.training.data.plan import EvaluationPlan
from onecurve.training.data.predicted_rows import find_path_problem, read_predicted
from onecurve.training.data.sources import check_content
from onecurve.training.data.tables import (
    ROWS_PER_CHUNK,
    Layout,
    Survey,
    add_columns,
    join_chunks,
    write_chunk,
)
from onecurve.training.errors import BadInput, Preempted
from onecurve.training.lasting_output import protect_output
from onecurve.training.models.allocator import keep_blocks
from onecurve.training.models.loading import load_trained
from onecurve.training.parallel.launch import (
    Launch,
    check_device,
    check_processes,
    check_store,
    find_unsupported_precision,
    limited_joining,
    measure_bf16,
)
from onecurve.training.process import launcher_has_died
from onecurve.training.record.console import quiet_third_parties
from onecurve.training.recovery.checkpoints import find_model
from onecurve.training.run_directory import RunDirectory
from onecurve.training.tasks import Task, build_task
from onecurve.training.tasks.base import Rows
from onecurve.training.work_progress import WorkProgress


class Stopped(Exception):
    """This process was asked to stop; the other ranks learn of it when all ranks synchronize."""


@dataclass(frozen=True)
class Request:
    """What to label with what.

    Attributes:
        model: folder of the model: final/, or a checkpoint.
        batch_size: most rows that go through the model at once; None takes the run's per_device_batch_size.
    """

    run: RunDirectory
    input: Path
    output: Path
    model: Path
    batch_size: int | None = None


def parse_request(arguments: Sequence[str]) -> Request:
    """Read the command line.

    Raises:
        BadInput: a flag is unknown or missing, or a file is of a kind that is not known.
    """
    _, flags = parse_arguments(arguments)
    known = ("run", "input", "output", "checkpoint", "batch_size", "overwrite")
    unknown = [f"--{name}" for name in flags if name not in known]
    missing = [f"--{name}" for name in ("run", "input", "output") if name not in flags]
    if unknown or missing:
        raise BadInput(
            f"predict takes {', '.join(f'--{name}' for name in known)}; unknown {unknown}, missing {missing}"
        )
    size = flags.get("batch_size")
    if size is not None and not (size.isdigit() and int(size) > 0):
        raise BadInput(f"--batch_size: must be a positive number, got {size!r}")
    run = RunDirectory(Path(flags["run"]))
    model = find_model(run, flags.get("checkpoint"))
    request = Request(run, Path(flags["input"]), Path(flags["output"]), model, int(size) if size else None)
    is_replaced = flags.get("overwrite", "false").lower() == "true"
    if problem := find_path_problem(request.input, request.output, is_replaced):
        raise BadInput(problem)
    return request


def main(arguments: Sequence[str], outcome: Outcome) -> None:
    """Check the file, load the model, label chunk after chunk, put the chunks together."""
    quiet_third_parties()
    request = parse_request(arguments)
    recipe = load_recipe(str(request.run.config)).recipe
    check_processes()
    check_device()
    rates = measure_bf16(recipe)
    if find_unsupported_precision(recipe) is not None or (rates is not None and rates.is_too_slow):
        outcome.print_once(
            f"labels in float32: this machine has no arithmetic of the run's mixed_precision {recipe.mixed_precision}"
        )
        recipe = recipe.model_copy(update={"mixed_precision": "no"})
    _end_at_signals(request.output)
    check_store()
    launch = Launch.from_environment()
    with limited_joining(launch, lambda message: outcome.write_status("failed", BadInput.exit_code, message)):
        uses_cpu = launch.uses_cpu or not torch.accelerator.is_available()
        accelerator = Accelerator(cpu=uses_cpu, mixed_precision=recipe.mixed_precision)
    scratch = _share_scratch(accelerator, request.output)
    survey, layout = Survey(request.input, request.output), None
    notes: dict[str, str] = {}
    try:
        with contextlib.suppress(Stopped):
            layout = label_file(request, recipe, accelerator, scratch, survey, notes)
        # Here all meet: one may have been asked to stop when another was done.
        was_stopped = torch.tensor([int(layout is None)], device=accelerator.device)
        if accelerator.gather(was_stopped).any() or layout is None:
            raise Preempted(
                f"stopped as asked: {request.output} is not written; start it again to label it from the start"
            )
        if accelerator.is_main_process:
            num_chunks = math.ceil(survey.num_rows / ROWS_PER_CHUNK)
            join_chunks([scratch / f"{number:08d}" for number in range(num_chunks)], layout)
    finally:
        if accelerator.is_main_process:
            shutil.rmtree(scratch, ignore_errors=True)
    for line in dict(reversed(gather_object(list(notes.items())))).values():  # Of each kind the first one's.
        outcome.print_once(line)
    outcome.print_once(f"{survey.num_rows} rows labelled: {request.output}")
    accelerator.end_training()


def _end_at_signals(output: Path) -> None:
    """Let a signal to this process end it at once, but not without clearing up behind it."""

    def end(number: int, frame: FrameType | None) -> None:
        for each in signals:  # torch's agent repeats what the terminal or the launcher has sent.
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt(f"ended at once, as asked: {output} is not written")

    signals = (signal.SIGTERM, signal.SIGINT)
    for each in signals:
        signal.signal(each, end)


def _share_scratch(accelerator: Accelerator, output: Path) -> Path:
    """A folder beside the output, made by one process and known to all.

    Raises:
        BadInput: on all processes, if it can't be made.
    """
    shared = ["", ""]
    if accelerator.is_main_process:
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            shared[0] = tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}.")
        except OSError as error:
            shared[1] = f"--output: {str(output.parent)!r} can't be written to: {error.strerror}; give another folder"
    broadcast_object_list(shared)
    if shared[1]:
        raise BadInput(shared[1])
    return Path(shared[0])


def check_stop() -> None:
    """Look whether the launcher asks for a stop; before each batch.

    Raises:
        Stopped: it does, or it has died.
    """
    path = os.environ.get(launch_protocol.STOP_FILE)
    if launcher_has_died() or (path is not None and os.path.exists(path)):
        raise Stopped


def label_file(
    request: Request, recipe: Recipe, accelerator: Accelerator, scratch: Path, survey: Survey, notes: dict[str, str]
) -> Layout:
    """Check all rows, then label the chunks that are this process's and leave them in the scratch folder.

    Args:
        notes: gets the task's lines about the rows that this process has labelled.

    Raises:
        BadInput: the file can't be read or labelled; on all processes, before anything is labelled.
        Stopped: this process was asked to stop.
    """
    task = build_task(recipe)
    check_rows(survey, task)
    model, processor = load_trained(request.model, recipe, task)
    if accelerator.device.type == "cpu":
        keep_blocks()
    model.to(accelerator.device).eval()
    task.facts = task.model_facts
    size = request.batch_size or recipe.per_device_batch_size

    layout = survey.build_layout(task.prediction_example())
    start, say = 0, None if accelerator.is_main_process else _say_nothing
    with WorkProgress("predicting", survey.num_rows, "rows", say) as progress:
        for number, rows in enumerate(read_predicted(request.input, task)):
            if number % accelerator.num_processes == accelerator.process_index:
                numbers = np.arange(start, start + len(rows))
                lines = label(rows, numbers, request.input, task, processor, model, accelerator, size)
                added = {name: [line[name] for line in lines] for name in lines[0]}
                write_chunk(scratch / f"{number:08d}", add_columns(rows, added), layout)
            start += len(rows)
            progress.reach(start)  # The chunks of other processes take as long.
    notes.update(task.notes)
    return layout


def _say_nothing(line: str) -> None:
    """Of several processes one says how far they are."""


def check_rows(survey: Survey, task: Task) -> None:
    """Read the whole file and refuse one that can't be labelled: every process finds the same, before the work.

    Raises:
        BadInput: naming the first row that can't be labelled, counted from 1, or what else is wrong with the file.
    """
    path = survey.input
    if path.is_file():
        check_content(path)
    columns = task.columns(task.recipe, with_targets=False)
    for rows in read_predicted(path, task):
        check_stop()
        start = survey.num_rows + 1
        survey.look(rows)
        for key, names in columns.items():
            for name in names:
                if name not in survey.columns:
                    raise BadInput(f"{path}: {key} {name!r} is not a column; it has {', '.join(survey.columns)}")
        for number, row in enumerate(rows, start):
            if problem := task.find_row_problem(row, with_targets=False):
                raise BadInput(f"{path}, row {number}: {problem}")
    if not survey.num_rows:
        raise BadInput(f"{path}: has no rows")


def label(
    rows: list[dict[str, Any]],
    numbers: NDArray[Any],
    path: Path,
    task: Task,
    processor: Any,
    model: Any,
    accelerator: Accelerator,
    batch_size: int,
) -> list[dict[str, Any]]:
    """What the task predicts of each row of a chunk, in its order, computed in batches of near-equal length."""
    names = [name for each in task.columns(task.recipe, with_targets=False).values() for name in each]
    table = pa.Table.from_pydict({name: [row[name] for row in rows] for name in names})
    examples = task.encode(Rows(table, numbers, str(path)), processor, with_targets=False)
    lengths = task.measure(examples)
    kept = {name: examples.pop(name) for name in task.unbatched_features & examples.keys()}
    collator = Collator(task, processor)
    found: dict[str, list[Any]] = {}
    order: list[int] = []
    for micro_batch in EvaluationPlan(lengths, 1, batch_size, task.recipe.per_device_batch_tokens):
        check_stop()
        features = {name: _pick(values, micro_batch.indices) for name, values in examples.items()}
        batch = send_to_device(collator(features), accelerator.device)
        with torch.no_grad(), accelerator.autocast():
            results = task.predict(model, batch)
        order += micro_batch.indices.tolist()
        for name, values in results.items():
            values, is_ragged = values.cpu(), name in task.ragged_results
            of_each = collator.layout.split(values, lengths[micro_batch.indices]) if is_ragged else values
            found.setdefault(name, []).extend(each.numpy() for each in of_each)
    places = np.argsort(order)
    in_order: dict[str, Any] = {name: [values[place] for place in places] for name, values in found.items()}
    return list(task.describe_predictions({**in_order, **kept}))


def _pick(values: Any, indices: NDArray[Any]) -> Any:
    return values[indices] if isinstance(values, np.ndarray) else [values[index] for index in indices]


if __name__ == "__main__":
    protect_output()
    end_process(report_outcome(main, sys.argv[1:]))
