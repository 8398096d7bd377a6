"""Label a file with a trained model: the same rows in the same order, a prediction and its probabilities added.

    accelerate launch training/predict.py --run runs/demo --input texts.jsonl --output labelled.jsonl

`onecurve predict` runs it. The file is read twice: first all of it is checked, then it is labelled. Rows stream through in
chunks, so a file may be larger than memory. Chunk i belongs to process i mod P, and its micro-batches depend on nothing
else, so any number of processes writes the same bytes.
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

from onecurve.training.outcome import Outcome, report_outcome  # isort: split

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from onecurve.training.config import Recipe, load_recipe, parse_arguments
from onecurve.training.data.plan import EvaluationPlan
from onecurve.training.data.tables import (
    FORMATS,
    ROWS_PER_CHUNK,
    Layout,
    Survey,
    add_columns,
    join_chunks,
    read_chunks,
    write_chunk,
)
from onecurve.training.errors import BadInput, Preempted
from onecurve.training.models.loading import load_tokenizer
from onecurve.training.parallel.launch import Launch, check_processes, check_store, find_unsupported_precision
from onecurve.training.process import launcher_has_died
from onecurve.training.record.reporter import quiet_third_parties
from onecurve.training.run_directory import RunDirectory
from onecurve.training.tasks import TextClassification, build_task

Columns = dict[str, list[Any]]


class Stopped(Exception):
    """This process was asked to stop; the others are told when all meet."""


@dataclass(frozen=True)
class Request:
    """What to label with what.

    Attributes:
        batch_size: most rows that go through the model at once; None takes the run's per_device_batch_size.
    """

    run: RunDirectory
    input: Path
    output: Path
    batch_size: int | None = None


def parse_request(arguments: Sequence[str]) -> Request:
    """Read the command line.

    Raises:
        BadInput: a flag is unknown or missing, or a file is of a kind that is not known.
    """
    _, flags = parse_arguments(arguments)
    unknown = [f"--{name}" for name in flags if name not in ("run", "input", "output", "batch_size")]
    missing = [f"--{name}" for name in ("run", "input", "output") if name not in flags]
    if unknown or missing:
        raise BadInput(f"predict takes --run, --input, --output and --batch_size; unknown {unknown}, missing {missing}")
    size = flags.get("batch_size")
    if size is not None and not (size.isdigit() and int(size) > 0):
        raise BadInput(f"--batch_size: must be a positive number, got {size!r}")
    request = Request(
        RunDirectory(Path(flags["run"])), Path(flags["input"]), Path(flags["output"]), int(size) if size else None
    )
    if not request.run.final.is_dir():
        raise BadInput(f"{str(request.run.path)!r} has no final/: its training is not finished")
    for name, path in (("--input", request.input), ("--output", request.output)):
        if path.suffix.lower() not in FORMATS:
            raise BadInput(f"{name} {str(path)!r} is none of {', '.join(FORMATS)}")
    if request.output.is_dir():
        raise BadInput(f"--output {str(request.output)!r} is a folder; give a file")
    return request


def main(arguments: Sequence[str], outcome: Outcome) -> None:
    """Check the file, load the model, label chunk after chunk, put the chunks together."""
    quiet_third_parties()
    request = parse_request(arguments)
    recipe = load_recipe(str(request.run.config)).recipe
    check_processes()
    if find_unsupported_precision(recipe) is not None:
        outcome.print_once(
            f"labels in float32: this machine has no arithmetic of the run's mixed_precision {recipe.mixed_precision}"
        )
        recipe = recipe.model_copy(update={"mixed_precision": "no"})
    _end_at_signals(request.output)
    check_store()
    uses_cpu = Launch.from_environment().uses_cpu or not torch.accelerator.is_available()
    accelerator = Accelerator(cpu=uses_cpu, mixed_precision=recipe.mixed_precision)
    scratch = _share_scratch(accelerator, request.output)
    survey, layout = Survey(request.input, request.output), None
    try:
        with contextlib.suppress(Stopped):
            layout = label_file(request, recipe, accelerator, scratch, survey)
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
        Stopped: it does, or is gone.
    """
    path = os.environ.get("ONECURVE_STOP_FILE")
    if launcher_has_died() or (path is not None and os.path.exists(path)):
        raise Stopped


def label_file(request: Request, recipe: Recipe, accelerator: Accelerator, scratch: Path, survey: Survey) -> Layout:
    """Check all rows, then label the chunks that are this process's and leave them in the scratch folder.

    Raises:
        BadInput: the file can't be read or labelled; on all processes, before anything is labelled.
        Stopped: this process was asked to stop.
    """
    task = build_task(recipe)
    check_rows(survey, task)
    model = task.model_class.from_pretrained(
        request.run.final, dtype=torch.float32, use_safetensors=True, trust_remote_code=recipe.trust_remote_code
    )
    model.to(accelerator.device).eval()
    if task.problem_type != "regression":
        task.label_names = [model.config.id2label[number] for number in range(model.config.num_labels)]
    final = recipe.model_copy(update={"model_name_or_path": str(request.run.final), "tokenizer_name": None})
    tokenizer = load_tokenizer(final, model.config)
    size = request.batch_size or recipe.per_device_batch_size

    layout = survey.build_layout(describe_example(task))
    for number, rows in enumerate(read_chunks(request.input)):
        if number % accelerator.num_processes == accelerator.process_index:
            columns = {name: [row[name] for row in rows] for name in task.text_columns}
            added = label(columns, task, tokenizer, model, accelerator, recipe, size)
            write_chunk(scratch / f"{number:08d}", add_columns(rows, added), layout)
    return layout


def check_rows(survey: Survey, task: TextClassification) -> None:
    """Read the whole file and refuse one that can't be labelled: every process finds the same, before the work.

    Raises:
        BadInput: naming the first row without text, counted from 1, or what else is wrong with the file.
    """
    path = survey.input
    for rows in read_chunks(path):
        check_stop()
        start = survey.num_rows + 1
        survey.look(rows)
        for name in task.text_columns:
            if name not in survey.columns:
                raise BadInput(f"{path}: text column {name!r} is not there; it has {', '.join(survey.columns)}")
            for number, row in enumerate(rows, start):
                text = row.get(name)
                if text is not None and not isinstance(text, str):
                    raise BadInput(f"{path}, row {number}: text column {name!r} holds {text!r:.40}, which is no text")
                if not text or not text.strip():
                    raise BadInput(f"{path}, row {number}: text column {name!r} is empty; fill or remove the row")
    if not survey.num_rows:
        raise BadInput(f"{path}: has no rows")


def label(
    columns: Columns,
    task: TextClassification,
    tokenizer: Any,
    model: Any,
    accelerator: Accelerator,
    recipe: Recipe,
    batch_size: int,
) -> Columns:
    """Predictions and probabilities of a chunk, in its order, computed in batches of near-equal length."""
    features = task.tokenize(tokenizer, columns)
    lengths = np.array([len(tokens) for tokens in features["input_ids"]])
    predictions: list[Any] = [None] * len(lengths)
    scores: list[Any] = [None] * len(lengths)
    for plan in EvaluationPlan(lengths, 1, batch_size, recipe.per_device_batch_tokens):
        check_stop()
        rows = {name: [values[index] for index in plan.indices] for name, values in features.items()}
        batch = tokenizer.pad(rows, return_tensors="pt").to(accelerator.device)
        with torch.no_grad(), accelerator.autocast():
            logits = model(**batch).logits
        found = [tensor.cpu().numpy() for tensor in task.predict(logits)]
        for index, prediction, score in zip(plan.indices, *found, strict=True):
            predictions[index], scores[index] = prediction, score
    return describe(task, predictions, scores)


def describe(task: TextClassification, predictions: Sequence[Any], scores: Sequence[Any]) -> Columns:
    """The columns to add: prediction and, for classes, the score of what was predicted and every probability."""
    if task.problem_type == "regression":
        return {"prediction": [float(value) for value in predictions]}
    names = task.label_names
    table = np.stack(list(scores))
    probabilities = {f"probability_{name}": table[:, number].tolist() for number, name in enumerate(names)}
    if task.problem_type == "multi_label_classification":
        chosen = [[name for name, is_on in zip(names, row, strict=True) if is_on] for row in predictions]
        return {"prediction": chosen, **probabilities}
    return {
        "prediction": [names[int(value)] for value in predictions],
        "score": table.max(axis=1).tolist(),
        **probabilities,
    }


def describe_example(task: TextClassification) -> dict[str, Any]:
    """Names and kinds of the columns to add, as those of one row."""
    count = task.num_labels
    prediction = np.ones(count) if task.problem_type == "multi_label_classification" else 0
    return {name: values[0] for name, values in describe(task, [prediction], [np.zeros(count)]).items()}


if __name__ == "__main__":
    sys.exit(report_outcome(main, sys.argv[1:]))
