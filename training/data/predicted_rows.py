"""What `predict` reads and writes: the rows of a file, or the images of a folder, and where predictions go."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from onecurve.training.data.folder_rows import COLUMNS, iterate_new_images
from onecurve.training.data.sources import FORMATS, WRITABLE_FORMATS
from onecurve.training.data.tables import ROWS_PER_CHUNK, Row, read_chunks
from onecurve.training.errors import BadInput

if TYPE_CHECKING:
    from onecurve.training.tasks.base import Task


def find_path_problem(source: Path, target: Path, is_replaced: bool) -> str | None:
    """What is wrong with the names of --input and --output; None where nothing is.

    Args:
        is_replaced: whether an output that exists may be overwritten.
    """
    if not (source.is_file() or source.is_dir()):
        return f"--input {str(source)!r} does not exist"
    files = [("--output", target, WRITABLE_FORMATS)]
    if not source.is_dir():
        files.insert(0, ("--input", source, tuple(FORMATS)))
    elif source.resolve() in target.resolve().parents:
        return f"--output {str(target)!r} lies in the folder of images that is read; give a file elsewhere"
    for name, path, suffixes in files:
        if path.suffix.lower() not in suffixes:
            return f"{name} {str(path)!r} is none of {', '.join(suffixes)}"
    if target.is_dir():
        return f"--output {str(target)!r} is a folder; give a file"
    if target.absolute() == source.absolute():
        return "--output would overwrite --input; give another file"
    if target.exists() and not is_replaced:
        return f"--output {str(target)!r} exists; give another file, or --overwrite to replace it"
    return None


def read_predicted(path: Path, task: Task) -> Iterator[list[Row]]:
    """The rows in order, a thousand at a time: of a file as it has them, of a folder one for each image, by class and name.

    Raises:
        BadInput: the file or folder can't be read, or the task reads no images.
    """
    if not path.is_dir():
        yield from read_chunks(path)
        return
    columns = list(task.named_files())
    if len(columns) != 1:
        raise BadInput(f"--input {str(path)!r} is a folder, and {task.recipe.task} reads no images; give a file")
    rows = ({columns[0]: row.pop(COLUMNS[0]), **row} for row in iterate_new_images(path))
    while chunk := list(islice(rows, ROWS_PER_CHUNK)):
        yield chunk
