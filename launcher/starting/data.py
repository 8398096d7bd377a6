"""What the word DATA of `onecurve init DATA` names: files, a folder of them, a save_to_disk folder, or a data set of the hub."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

from onecurve.launcher.errors import UsageError
from onecurve.launcher.preflight.hub import looks_like_path
from onecurve.training.data.sources import FORMATS, find_files, suggest_separator
from onecurve.training.data.tables import read_chunks, read_class_names, read_head
from onecurve.training.errors import BadInput
from onecurve.training.survey import Survey, survey_rows

_TRAIN = ("train", "training")
_VALIDATION = ("validation", "valid", "val", "dev", "eval")
_TEST = ("test", "testing")
_SAVED = ("dataset_dict.json", "state.json")
# Names of files that say nothing of what is in them; their folder's does.
_PLAIN_NAMES = {*_TRAIN, *_VALIDATION, *_TEST, "data", "dataset", "rows", "output", "all"}
_ROWS_OF_TEST = 20
_FORMAT_NAMES = {
    ".csv": "CSV",
    ".tsv": "TSV",
    ".json": "JSON",
    ".jsonl": "JSON Lines",
    ".parquet": "Parquet",
    ".conll": "CoNLL",
}


@dataclass(frozen=True)
class Data:
    """Data to begin with.

    Attributes:
        keys: of the recipe, that name it.
        name: for people and for the names of files, such as "reviews".
        found: what it is, in one line.
        survey: of the training data.
        splits: rows of each split of a data set; empty for files.
        test_file: a file beside it that looks like test data.
    """

    keys: Mapping[str, Any]
    name: str
    found: str
    survey: Survey
    splits: Mapping[str, int] = field(default_factory=dict)
    test_file: Path | None = None

    @property
    def has_validation(self) -> bool:
        """Whether it brings data to evaluate on."""
        return "validation_file" in self.keys or "validation_split" in self.keys

    def fits_test(self, columns: Sequence[str]) -> bool:
        """Whether the test file has these columns, and values in them: many test files have no labels."""
        if self.test_file is None:
            return False
        try:
            head = read_head(self.test_file, _ROWS_OF_TEST)
        except BadInput:
            return False
        rows = head.rows
        return bool(rows) and all(row.get(column) not in (None, "", -1, "-1") for row in rows for column in columns)


def find_data(words: Sequence[str], config: str | None = None) -> Data:
    """Look at the data.

    Args:
        words: files, patterns of files, or one folder or name on the hub.
        config: the configuration of a data set of the hub.

    Raises:
        UsageError: there is nothing of that name, or nothing that can be read.
    """
    [first, *others] = words
    path = Path(first).expanduser()
    try:
        if path.is_dir() and not others:
            return _find_in_folder(path, first)
        if not others and not path.exists() and _could_be_on_hub(first):
            return _describe_data_set(first, config)
        return _survey_files(words)
    except BadInput as bad:
        raise UsageError(str(bad)) from None


def _could_be_on_hub(name: str) -> bool:
    """Whether a name of no file could be that of a data set: `imdb`, `user/reviews`, `user/reviews-v1.2`."""
    suffix = Path(name).suffix.lower()
    has_owner = "/" in name and suffix not in FORMATS
    return (not suffix or has_owner) and not looks_like_path(name) and not any(letter in name for letter in "*?[$")


def _find_in_folder(folder: Path, name: str) -> Data:
    """A save_to_disk folder, or a folder whose files are named by their splits.

    Raises:
        BadInput: it is neither.
    """
    if any((folder / each).is_file() for each in _SAVED):
        return _describe_data_set(name, None)
    inside = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    files = [path for path in inside if path.is_file() and path.suffix.lower() in FORMATS]
    folders = [path for path in inside if path.is_dir()]
    if not all(path.name.lower() in (*_TRAIN, *_VALIDATION, *_TEST) for path in folders):
        folders = []  # They are classes of images, one of which may be trains.
    trains = [path for path in (*files, *folders) if _is_split(path, _TRAIN)]
    if trains or len(files) == 1:
        return _survey_files([str(path) for path in trains or files])
    if files:
        named = ", ".join(path.name for path in files[:5])
        raise BadInput(f"{str(folder)!r} has {len(files)} files ({named}{', ...' * (len(files) > 5)}), and none is named train; "
                       "give the file or files to train on")  # fmt: skip
    if (folder / "config.json").is_file():
        raise BadInput(f"{str(folder)!r} is a model; give the data first, and the model as --model")
    return _survey_files([name])  # A folder of images for each class, or nothing that can be read.


def _is_split(path: Path, names: Sequence[str]) -> bool:
    """Whether a file is named by a split: train.csv, train-00000-of-00002.parquet, imdb_train.jsonl."""
    words = path.stem.lower().replace("-", " ").replace("_", " ").replace(".", " ").split()
    return any(name in words for name in names)


def _find_beside(paths: Sequence[Path], names: Sequence[str]) -> list[Path]:
    """Files beside those to train on that have the same format, and the name of another split in theirs."""
    first = paths[0]
    if not all(_is_split(path, _TRAIN) for path in paths):
        return []
    others = [path for path in sorted(first.parent.iterdir()) if path.suffix == first.suffix]
    for name in names:
        for train in _TRAIN:
            wanted = first.name.replace(train, name)
            if wanted != first.name and first.parent / wanted in others:
                return [first.parent / wanted]
    found = [path for path in others if _is_split(path, names) and path not in paths]
    return found if len(found) == 1 or "-of-" in first.name else []


def _survey_files(patterns: Sequence[str]) -> Data:
    """Files to train on, with those of the validation beside them.

    Raises:
        BadInput: they can't be read.
    """
    paths = find_files("DATA", patterns)
    rows: Iterator[Mapping[str, Any]] = chain.from_iterable(chain.from_iterable(map(read_chunks, paths)))
    for path in paths:
        head = read_head(path, 2)  # Refuses a file of one object with all rows, which has rows of its own otherwise.
        if hint := suggest_separator(head.columns):
            raise BadInput(f"{path}: has one column, {head.columns[0]!r}{hint}")
    survey = replace(survey_rows(rows).with_class_names(read_class_names(paths[0])), folder=str(paths[0].parent))
    if not survey.num_rows:
        raise BadInput(f"{paths[0]}: has no rows")
    keys: dict[str, Any] = {"train_file": _name_files(patterns)}
    validation = _find_beside(paths, _VALIDATION)
    if validation:
        keys["validation_file"] = _name_files([str(path) for path in validation])
    test = _find_beside(paths, _TEST)
    kind = "folder of images" if paths[0].is_dir() else f"{_FORMAT_NAMES[paths[0].suffix.lower()]} file"
    files = f"{len(paths)} {kind}s" if len(paths) > 1 else f"a {kind}"
    unit = "image" if paths[0].is_dir() else "row"
    count = f"{survey.num_rows:,} {unit}{'s' * (survey.num_rows != 1)}"
    return Data(
        keys=keys,
        name=_choose_name(paths[0]),
        found=f"{files} of {count}" if survey.is_whole else f"{files}, of which the first {count} were read",
        survey=survey,
        test_file=test[0] if len(test) == 1 else None,
    )


def _name_files(patterns: Sequence[str]) -> str | list[str]:
    return patterns[0] if len(patterns) == 1 else list(patterns)


def _choose_name(path: Path) -> str:
    """What the data is called: its file's name, or where that says only which split it is, its folder's."""
    words = [word for word in path.stem.replace("-", "_").split("_") if word.lower() not in _PLAIN_NAMES]
    name = "_".join(words) or path.absolute().parent.name
    return name or "data"


def _describe_data_set(name: str, config: str | None) -> Data:
    """A data set that `datasets` loads, in a process of its own: the launcher does not import it.

    Raises:
        BadInput: it can't be loaded.
    """
    script = Path(__file__).resolve().parents[2] / "training" / "describe_data.py"
    words = [name, *([config] if config is not None else [])]
    result = subprocess.run([sys.executable, str(script), *words], capture_output=True, text=True, check=False)
    try:
        answer = json.loads(result.stdout.strip().rpartition("\n")[2])
    except ValueError:
        answer = {"problem": result.stderr.strip().rpartition("\n")[2] or f"exit code {result.returncode}"}
    if "problem" in answer:
        kinds = f"no file, no folder, and could not be loaded from the hub or its cache: {answer['problem']}"
        advice = "; --dataset_config_name names a configuration" if "config" in answer["problem"].lower() else ""
        raise BadInput(f"{name!r} is {kinds}{advice}" if not Path(name).exists() else f"{name!r}: {answer['problem']}")
    keys: dict[str, Any] = {"dataset_name": name}
    if config is not None:
        keys["dataset_config_name"] = config
    if answer["has_splits"]:
        keys["train_split"] = answer["train"]
        if answer["validation"] is not None:
            keys["validation_split"] = answer["validation"]
    shown = ", ".join(f"{split} {count:,}" for split, count in answer["splits"].items())
    survey = Survey.from_json(answer["survey"])
    if not survey.num_rows:
        raise BadInput(f"{name!r}: split {answer['train']!r} has no rows")
    return Data(
        keys=keys,
        name=Path(name).name,
        found=f"a data set (rows: {shown})",
        survey=survey,
        splits=answer["splits"],
    )
