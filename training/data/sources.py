"""Which files a recipe's keys name, and the messages for those that can't be used; training and launcher share them."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

from onecurve.training.data.folder_rows import holds_classes
from onecurve.training.errors import BadInput
from onecurve.training.recipe import find_nearest

FORMATS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".conll": "conll"}

# Formats that are read alone.
WRITABLE_FORMATS = tuple(suffix for suffix, name in FORMATS.items() if name != "conll")

_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "vertical bars", ",": "commas"}


def find_format(path: Path) -> str:
    """One of csv (commas or tabs), json (lines or an array), parquet, conll (a word a line), and folder (of images)."""
    return "folder" if path.is_dir() else FORMATS[path.suffix.lower()]


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
    seen: dict[tuple[int, int], Path] = {}
    for path in paths:
        same = seen.setdefault((path.stat().st_dev, path.stat().st_ino), path)
        if same is not path:
            raise BadInput(
                f"{key}: {str(path)!r} is named twice, also as {str(same)!r}: its rows would count twice; name it once"
            )
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
        if not holds_classes(path):
            raise BadInput(
                f"{key}: {str(path)!r} is a folder without folders of images, one for each class; for a save_to_disk folder use "
                "dataset_name"
            )
        return
    if path.suffix.lower() not in FORMATS:
        hint = " (a file of words and tags, one a line, is .conll)" if path.suffix.lower() == ".txt" else ""
        raise BadInput(f"{key}: {str(path)!r} is none of {', '.join(FORMATS)}; rename or convert it{hint}")
    if path.stat().st_size == 0:
        raise BadInput(f"{key}: {str(path)!r} is empty")
    check_content(path)


# How files begin that are not what their name says, and what to do about each.
_OTHER_KINDS = (
    (rb"version https://git-lfs", "is a pointer of Git LFS, not the file itself; run `git lfs pull`"),
    (rb"\x1f\x8b", "is compressed with gzip; unpack it"),
    (rb"BZh", "is compressed with bzip2; unpack it"),
    (rb"\xfd7zXZ\x00", "is compressed with xz; unpack it"),
    (rb"\x28\xb5\x2f\xfd", "is compressed with zstd; unpack it"),
    (rb"PK\x03\x04", "is an Excel workbook or another zip archive; unpack it, or save the sheet as CSV"),
    (rb"\xd0\xcf\x11\xe0", "is an Excel workbook; save the sheet as CSV"),
    (rb"\xff\xfe|\xfe\xff", "is saved as UTF-16; save it as UTF-8"),
    (rb"(?i)\s*<(!doctype html|html)", "is an HTML page, perhaps of a download that failed; get the file itself"),
    (rb"(?i)\"?sep=", "begins with Excel's line for the separator, sep=; remove this line, and separate by commas"),
)


def check_content(path: Path) -> None:
    """Refuse a file whose first bytes show that it is not what its name says.

    Raises:
        BadInput: naming what it is.
    """
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(b"PAR1") and find_format(path) != "parquet":
        raise BadInput(f"{path}: is a Parquet file; name it .parquet")
    for pattern, problem in _OTHER_KINDS:
        if re.match(pattern, head):
            raise BadInput(f"{path}: {problem}")


def describe_missing_column(origin: str, key: str, name: str, columns: Sequence[str]) -> str:
    """The message for a column that a recipe's key names and the table lacks."""
    nearest = find_nearest(name, columns)
    hint = suggest_separator(columns) or (f"; did you mean {_show(nearest)}?" if nearest else "")
    if nearest is not None and nearest.strip() == name:
        hint = f"; the header writes {nearest!r}, with spaces: remove them"
    return f"{origin}: {key} {name!r} is not a column; it has {', '.join(map(_show, columns))}{hint}"


def _show(name: str) -> str:
    return name if name == name.strip() else repr(name)


def suggest_separator(columns: Sequence[str]) -> str:
    """What to say when a table has one column whose name looks like several; empty where it does not."""
    found = [word for separator, word in _SEPARATORS.items() if len(columns) == 1 and separator in columns[0]]
    return f"; is the file separated by {found[0]}? Save it with commas (or tabs, as .tsv)" if found else ""
