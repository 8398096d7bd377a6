"""The rows of each split as they came: from local files, a save_to_disk folder, or the hub."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from onecurve.training.data.columns import Array
from onecurve.training.data.folder_rows import iterate_images
from onecurve.training.data.named_files import describe_files, find_texts, iterate_texts
from onecurve.training.data.parquet_rows import find_class_names
from onecurve.training.data.sources import describe_missing_column, find_files
from onecurve.training.data.tables import read_table
from onecurve.training.errors import BadInput
from onecurve.training.recipe import Recipe
from onecurve.training.tasks.base import Rows

NAMES = ("train", "validation", "test")


@dataclass(frozen=True)
class RawSplit:
    """A split as it came.

    Attributes:
        table: all its rows and columns, memory-mapped.
        origin: the file or split, for messages.
        class_names: of each column whose schema names its classes: their names.
    """

    table: pa.Table
    origin: str
    class_names: Mapping[str, Sequence[str]]

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def rows(self, columns: Sequence[str], numbers: Array | None = None) -> Rows:
        """Some of the rows, in the order of `numbers`; all of them if it is None."""
        table = self.table.select(list(columns))
        if numbers is None:
            numbers = np.arange(len(self))
        else:
            table = self._take(columns, numbers)
        return Rows(table, numbers, self.origin, self.class_names)

    def _take(self, columns: Sequence[str], numbers: Array) -> pa.Table:
        """Rows by number. Table.take would copy whole columns first, each time."""
        order = np.argsort(numbers, kind="stable")
        of_batch = np.searchsorted(self._ends, numbers[order], side="right")
        pieces = []
        for number in np.unique(of_batch):
            start = self._ends[number - 1] if number else 0
            here = numbers[order][of_batch == number] - start
            pieces.append(self._batches[number].select(list(columns)).take(pa.array(here)))
        return pa.Table.from_batches(pieces).combine_chunks().take(pa.array(np.argsort(order)))

    @cached_property
    def _batches(self) -> list[pa.RecordBatch]:
        return [batch for batch in self.table.to_batches() if batch.num_rows]

    @cached_property
    def _ends(self) -> Array:
        return np.cumsum([batch.num_rows for batch in self._batches])


class Sources:
    """Where the recipe's data is: local files of each split, a save_to_disk folder, or the hub."""

    def __init__(self, recipe: Recipe) -> None:
        """Find them.

        Raises:
            BadInput: a file is not there, or of no known format.
        """
        self._recipe = recipe
        patterns = {"train": recipe.train_file, "validation": recipe.validation_file, "test": recipe.test_file}
        self.files = {
            name: find_files(f"{name}_file", wanted) for name, wanted in patterns.items() if wanted is not None
        }
        folder = Path(recipe.dataset_name).expanduser() if recipe.dataset_name is not None else None
        is_saved = folder is not None and any((folder / name).exists() for name in ("dataset_dict.json", "state.json"))
        self._folder = folder if is_saved else None

    def fingerprint(self) -> dict[str, Any]:
        """What names the data by its content; changes whenever a byte of it does.

        Raises:
            BadInput: a file can't be read.
        """
        found: dict[str, Any] = {name: [_digest(path) for path in paths] for name, paths in self.files.items()}
        if self._folder is not None:
            found["folder"] = [_digest(path) for path in sorted(self._folder.rglob("*")) if path.is_file()]
        elif self._recipe.dataset_name is not None:
            wanted = [self._hub_split(name) for name in NAMES if name not in self.files]
            # The hub's own hash of the data.
            found["hub"] = [_load_from_hub(self._recipe, name)._fingerprint for name in wanted if name is not None]
        return found

    def fingerprint_named(self, folders: Mapping[str, Path]) -> str:
        """What names the files that rows name; changes whenever one of them does.

        Args:
            folders: from which the paths of a column lead, by the column's name.
        """
        digest = hashlib.sha256()
        for column, folder in folders.items():
            for path in chain.from_iterable(self.files.values()):
                if not path.is_dir():  # That has named its images already.
                    texts = iterate_texts(path, column)
                    for line in describe_files(folder / text for text in texts):
                        digest.update(line)
            for name in NAMES if self._recipe.dataset_name is not None else ():
                split = self.read(name, Path()) if name not in self.files else None
                if split is not None and column in split.table.column_names:
                    for chunk in split.table.column(column).chunks:
                        for line in describe_files(folder / text for text in find_texts(chunk)):
                            digest.update(line)
        return digest.hexdigest()

    def read(self, name: str, scratch: Path) -> RawSplit | None:
        """The rows of a split; None where the recipe names none.

        Raises:
            BadInput: they can't be read; names the file and the line or row.
        """
        if name in self.files:
            paths = self.files[name]
            origin = str(paths[0]) if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
            (scratch / name).mkdir(parents=True)
            table = read_table(paths, scratch / name)
            return RawSplit(table, origin, find_class_names(table))
        recipe, wanted = self._recipe, self._hub_split(name)
        if recipe.dataset_name is None or wanted is None:
            return None
        origin = f"split {wanted!r} of {recipe.dataset_name}"
        if self._folder is None:
            return _from_datasets(_load_from_hub(recipe, wanted), origin)
        saved = datasets.load_from_disk(str(self._folder))
        if isinstance(saved, datasets.Dataset):
            if name != "train":
                raise BadInput(
                    f"validation_split: {recipe.dataset_name} has no splits; leave it out to hold some rows out"
                )
            return _from_datasets(saved, recipe.dataset_name)
        if wanted not in saved:
            raise BadInput(f"{name}_split: {recipe.dataset_name} has no split {wanted!r}; it has {', '.join(saved)}")
        return _from_datasets(saved[wanted], origin)

    def _hub_split(self, name: str) -> str | None:
        return {"train": self._recipe.train_split, "validation": self._recipe.validation_split, "test": None}[name]


def check_columns(split: RawSplit, columns: Mapping[str, Sequence[str]]) -> None:
    """Refuse a split without rows, or without a column that the recipe names.

    Args:
        columns: names by the recipe key that names them.

    Raises:
        BadInput: naming the key and the column.
    """
    if not len(split):
        raise BadInput(f"{split.origin}: has no rows")
    for key, names in columns.items():
        for name in names:
            if name not in split.table.column_names:
                raise BadInput(describe_missing_column(split.origin, key, name, split.table.column_names))


def _digest(path: Path) -> list[str]:
    if path.is_dir():
        digest = hashlib.sha256()
        for line in describe_files(Path(row["image"]) for row in iterate_images(path)):
            digest.update(line)
        return [str(path), digest.hexdigest()]
    try:
        with path.open("rb") as file:
            return [str(path), hashlib.file_digest(file, "sha256").hexdigest()]
    except OSError as error:
        raise BadInput(f"{str(path)!r} cannot be read: {error.strerror}") from None


def _from_datasets(table: datasets.Dataset, origin: str) -> RawSplit:
    plain = table.flatten_indices() if table._indices is not None else table
    names = {}
    for column, feature in plain.features.items():
        inner = getattr(feature, "feature", feature)
        if isinstance(inner, datasets.ClassLabel):
            names[column] = list(inner.names)
    return RawSplit(plain.data.table, origin, names)


def _load_from_hub(recipe: Recipe, split: str) -> datasets.Dataset:
    try:
        return datasets.load_dataset(recipe.dataset_name, recipe.dataset_config_name, split=split)
    except Exception as error:  # The hub's client has no common error: no network, no such name, no such split, ...
        reason = " ".join(str(error).split())
        raise BadInput(
            f"dataset_name: {recipe.dataset_name!r} (split {split!r}) could not be loaded from the hub or its cache: "
            f"{reason}. Without a network, give local files as train_file, or a save_to_disk folder as dataset_name"
        ) from None
