"""Which files a recipe's keys name, and the messages for those that can't be used; training and launcher share them."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

from onecurve.training.errors import BadInput
from onecurve.training.recipe import find_nearest

FORMATS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}

_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "vertical bars", ",": "commas"}


def find_format(path: Path) -> str:
    """One of csv (commas or tabs), json (lines or an array) and parquet."""
    return FORMATS[path.suffix.lower()]


def expand(pattern: str) -> list[Path]:
    """The files that a pattern names, sorted: the file of exactly this name if it exists, else what the glob matches.

    `~` and `$VARIABLES` are expanded. A pattern without wildcards names one file, whether it exists or not.
    """
    for literal in (pattern, os.path.expandvars(os.path.expanduser(pattern))):
        if os.path.exists(literal) or not glob.has_magic(literal):
            expanded = literal
            break
    else:
        return [Path(path) for path in sorted(glob.glob(literal, recursive=True))]
    if not os.path.exists(expanded):
        expanded = os.path.expandvars(os.path.expanduser(pattern))
    return [Path(expanded)]


def find_files(key: str, patterns: Sequence[str]) -> list[Path]:
    """All files of a recipe's key, in the order of its patterns; each exists and is of the same format.

    Raises:
        BadInput: naming the key and the first pattern or file that can't be used.
    """
    paths: list[Path] = []
    for pattern in patterns:
        found = expand(pattern)
        if not found:
            raise BadInput(f"{key}: no file matches {pattern!r}")
        paths += found
    for path in paths:
        check_file(key, path)
    formats = sorted({find_format(path) for path in paths})
    if len(formats) > 1:
        raise BadInput(f"{key}: its files are of several formats: {', '.join(formats)}; convert them to one of these")
    return paths


def check_file(key: str, path: Path) -> None:
    """Check that a file exists and could be a table, without reading it.

    Raises:
        BadInput: naming the key, the file, and the file that was probably meant.
    """
    if not os.path.exists(path):
        unset = re.findall(r"\$\w+|\$\{[^}]*\}", str(path))
        if unset:
            raise BadInput(f"{key}: {str(path)!r} does not exist; the variable {unset[0]} is not set")
        folder = path.parent if path.parent.is_dir() else Path()
        nearest = find_nearest(path.name, [other.name for other in folder.iterdir() if other.is_file()])
        raise BadInput(f"{key}: {str(path)!r} does not exist" + (f"; did you mean {nearest!r}?" if nearest else ""))
    if path.is_dir():
        raise BadInput(f"{key}: {str(path)!r} is a folder; for a save_to_disk folder use dataset_name")
    if path.suffix.lower() not in FORMATS:
        raise BadInput(f"{key}: {str(path)!r} is none of {', '.join(FORMATS)}; rename or convert it")
    if path.stat().st_size == 0:
        raise BadInput(f"{key}: {str(path)!r} is empty")


def describe_missing_column(origin: str, key: str, name: str, columns: Sequence[str]) -> str:
    """The message for a column that a recipe's key names and the table lacks."""
    nearest = find_nearest(name, columns)
    hint = suggest_separator(columns) or (f"; did you mean {nearest}?" if nearest else "")
    return f"{origin}: {key} {name!r} is not a column; it has {', '.join(columns)}{hint}"


def suggest_separator(columns: Sequence[str]) -> str:
    """What to say when a table has one column whose name looks like several; empty where it does not."""
    found = [word for separator, word in _SEPARATORS.items() if len(columns) == 1 and separator in columns[0]]
    return f"; is the file separated by {found[0]}? Save it with commas (or tabs, as .tsv)" if found else ""
