"""Look at a data set of the hub, or a save_to_disk folder, and print what it holds, as one JSON object.

    python training/describe_data.py NAME [CONFIGURATION]

`onecurve init` runs this, because the launcher does not import `datasets`. What is downloaded stays in the hub's cache.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # This file's own checkout or wheel, whatever else is installed; and not this folder, whose names are not for all.
    sys.path[0] = next(str(folder) for folder in Path(__file__).resolve().parents if (folder / "onecurve").is_dir())

import datasets

from onecurve.training.survey import IMAGE, MAX_ROWS_READ, survey_rows

_ROWS_AT_ONCE = 1_000
# What people call the split to train on, and the one to evaluate on.
_TRAIN, _VALIDATION = ("train", "training"), ("validation", "valid", "val", "dev", "eval")


def describe_data(name: str, config: str | None = None) -> dict[str, Any]:
    """Splits with their rows, which of them to train and evaluate on, and a survey of the former; or the problem."""
    folder = Path(name).expanduser()
    is_saved = any((folder / each).is_file() for each in ("dataset_dict.json", "state.json"))
    try:
        loaded = datasets.load_from_disk(str(folder)) if is_saved else datasets.load_dataset(name, config)
    except Exception as error:  # The hub's client has no common error: no network, no such name, no configuration, ...
        return {"problem": " ".join(str(error).split())}
    has_splits = not isinstance(loaded, datasets.Dataset)
    splits = dict(loaded) if has_splits else {"train": loaded}
    train = _find(splits, _TRAIN) or max(splits, key=lambda each: len(splits[each]))
    data = splits[train]
    stride = max(1, -(-len(data) // MAX_ROWS_READ))
    survey = survey_rows(_iterate(data, stride)).with_class_names(_find_class_names(data))
    has_images = any(column.holds(IMAGE) for column in survey.columns)
    return {
        "has_splits": has_splits,
        "splits": {each: len(rows) for each, rows in splits.items()},
        "train": train,
        "validation": _find({each: rows for each, rows in splits.items() if each != train}, _VALIDATION),
        "survey": replace(survey, is_complete=not has_images).to_json(),
    }


def _find(splits: dict[str, datasets.Dataset], names: tuple[str, ...]) -> str | None:
    """The split of one of these names, else the first that begins with one, as MNLI's validation_matched."""
    exact = [each for name in names for each in splits if each == name]
    return next(iter([*exact, *(each for name in names for each in splits if each.startswith(name))]), None)


def _iterate(data: datasets.Dataset, stride: int) -> Iterator[dict[str, Any]]:
    """Every `stride`-th row as it is stored; of images without their bytes."""
    stored = data.with_format("arrow")
    for start in range(0, len(data), _ROWS_AT_ONCE):
        table = stored[start : start + _ROWS_AT_ONCE]
        for row in table.take(list(range(-start % stride, len(table), stride))).to_pylist():
            yield {column: _shorten(value) for column, value in row.items()}


def _shorten(value: Any) -> Any:
    is_image = isinstance(value, dict) and value.keys() == {"bytes", "path"}
    return {"bytes": "", "path": value["path"]} if is_image else value


def _find_class_names(data: datasets.Dataset) -> dict[str, list[str]]:
    features = {column: getattr(feature, "feature", feature) for column, feature in data.features.items()}
    return {column: list(each.names) for column, each in features.items() if isinstance(each, datasets.ClassLabel)}


if __name__ == "__main__":
    print(json.dumps(describe_data(*sys.argv[1:]), default=str))
