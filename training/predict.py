"""Label a file with a trained model: the same rows in the same order, a prediction and its probabilities added.

    accelerate launch training/predict.py --run runs/demo --input texts.jsonl --output labelled.jsonl

`onecurve predict` runs it. Rows stream through in chunks, so a file may be larger than memory. Chunk i belongs to process
i mod P, and its micro-batches depend on nothing else, so any number of processes writes the same bytes.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from training import strategy
from training.config import Recipe, load_recipe, parse_arguments
from training.faults import BadInput, Outcome, report_outcome
from training.model import load_tokenizer
from training.reporting import quiet_third_parties
from training.run_directory import RunDirectory
from training.sampling import EvaluationPlan
from training.tasks import TextClassification, build_task

_FORMATS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
_ROWS_PER_CHUNK = 1_024

Columns = dict[str, list[Any]]


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
        if path.suffix.lower() not in _FORMATS:
            raise BadInput(f"{name} {str(path)!r} is none of {', '.join(_FORMATS)}")
    return request


def main(arguments: Sequence[str], outcome: Outcome) -> None:
    """Load the model, label chunk after chunk, put the chunks together."""
    quiet_third_parties()
    request = parse_request(arguments)
    recipe = load_recipe(str(request.run.config)).recipe
    strategy.check_launch(recipe)
    task = build_task(recipe)
    uses_cpu = strategy.Launched.from_environment().uses_cpu or not torch.accelerator.is_available()
    accelerator = Accelerator(cpu=uses_cpu, mixed_precision=recipe.mixed_precision)
    model = task.model_class.from_pretrained(request.run.final, dtype=torch.float32, use_safetensors=True)
    model.to(accelerator.device).eval()
    if task.problem_type != "regression":
        task.label_names = [model.config.id2label[number] for number in range(model.config.num_labels)]
    final = recipe.model_copy(update={"model_name_or_path": str(request.run.final), "tokenizer_name": None})
    tokenizer = load_tokenizer(final, model.config)
    size = request.batch_size or recipe.per_device_batch_size

    scratch = _share_scratch(accelerator, request.output)
    num_rows = num_chunks = 0
    try:
        for number, columns in enumerate(read_chunks(request.input, task)):
            start, num_chunks = num_rows, number + 1
            num_rows += len(columns[task.text_columns[0]])
            if number % accelerator.num_processes == accelerator.process_index:
                check_texts(columns, task, request.input, start)
                added = label(columns, task, tokenizer, model, accelerator, recipe, size)
                write_chunk(scratch / f"{number:08d}", {**columns, **added}, request.output)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            join_chunks([scratch / f"{number:08d}" for number in range(num_chunks)], request.output)
    finally:
        if accelerator.is_main_process:
            shutil.rmtree(scratch, ignore_errors=True)
    outcome.say(f"{num_rows} rows labelled: {request.output}")
    accelerator.end_training()


def _share_scratch(accelerator: Accelerator, output: Path) -> Path:
    """A folder beside the output, made by one process and known to all."""
    shared = [""]
    if accelerator.is_main_process:
        output.parent.mkdir(parents=True, exist_ok=True)
        shared[0] = tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}.")
    broadcast_object_list(shared)
    return Path(shared[0])


def read_chunks(path: Path, task: TextClassification) -> Iterator[Columns]:
    """Rows in the file's order, a thousand at a time, every column as it came.

    Raises:
        BadInput: the file can't be read, has no text column, or already has a column that would be added.
    """
    kind = _FORMATS[path.suffix.lower()]
    options = {"sep": "\t" if path.suffix.lower() == ".tsv" else ","} if kind == "csv" else {}
    first = True
    try:
        stream = datasets.load_dataset(kind, data_files=str(path), split="train", streaming=True, **options)
        for columns in stream.iter(batch_size=_ROWS_PER_CHUNK):
            if first:
                _check_columns(columns, task, path)
                first = False
            yield dict(columns)
    except BadInput:
        raise
    except Exception as error:  # The readers raise whatever their parsers do.
        cause = error.__cause__ or error
        raise BadInput(f"{path}: cannot be read as {kind}: {' '.join(str(cause).split())}") from None
    if first:
        raise BadInput(f"{path}: has no rows")


def _check_columns(columns: Columns, task: TextClassification, path: Path) -> None:
    for name in task.text_columns:
        if name not in columns:
            raise BadInput(f"{path}: text column {name!r} is not there; it has {', '.join(columns)}")
    taken = [name for name in columns if name in ("prediction", "score") or name.startswith("probability_")]
    if taken:
        raise BadInput(f"{path}: has columns that would be overwritten: {', '.join(taken)}; rename them")


def check_texts(columns: Columns, task: TextClassification, path: Path, start: int) -> None:
    """Refuse a row without text.

    Raises:
        BadInput: naming the row, counted from 1.
    """
    for name in task.text_columns:
        for number, text in enumerate(columns[name], start=start + 1):
            if not isinstance(text, str) or not text.strip():
                raise BadInput(f"{path}, row {number}: text column {name!r} is empty; fill or remove the row")


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


def write_chunk(path: Path, columns: Columns, output: Path) -> None:
    """Write a chunk as it will stand in the output: Parquet, or text without a header."""
    suffix = output.suffix.lower()
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pa.table(columns), path)
    elif suffix in (".csv", ".tsv"):
        flat = {name: [_to_cell(value) for value in values] for name, values in columns.items()}
        # The header travels with every chunk; only the first one's is kept.
        options = pyarrow.csv.WriteOptions(delimiter="\t" if suffix == ".tsv" else ",")
        pyarrow.csv.write_csv(pa.table(flat), path, options)
    else:
        names = list(columns)
        with path.open("w", encoding="utf-8") as file:
            for row in zip(*columns.values(), strict=True):
                file.write(json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=False, default=str) + "\n")


def _to_cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict)) else value


def join_chunks(chunks: Sequence[Path], output: Path) -> None:
    """Put the chunks behind each other and give the whole its name in one step."""
    joined = chunks[0].parent / "joined"
    if output.suffix.lower() == ".parquet":
        schema = pyarrow.parquet.read_schema(chunks[0])
        with pyarrow.parquet.ParquetWriter(joined, schema) as writer:
            for chunk in chunks:
                writer.write_table(pyarrow.parquet.read_table(chunk).cast(schema))
    else:
        has_header = output.suffix.lower() in (".csv", ".tsv")
        with joined.open("wb") as target:
            for number, chunk in enumerate(chunks):
                with chunk.open("rb") as source:
                    if has_header and number:
                        source.readline()
                    shutil.copyfileobj(source, target)
                chunk.unlink()
    joined.replace(output)


if __name__ == "__main__":
    sys.exit(report_outcome(main, sys.argv[1:]))
