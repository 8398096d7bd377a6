"""Rows of a folder that holds a folder of images for each class: columns "image", the path, and "label", the class.

What is to be predicted has no class yet: such a folder may hold images alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from onecurve.training.errors import BadInput

if TYPE_CHECKING:
    import pyarrow as pa

SUFFIXES = frozenset(
    {".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".ppm", ".pgm", ".pnm", ".tif", ".tiff", ".webp"}
)
COLUMNS = ("image", "label")

# What systems leave in folders that people have looked at.
_NO_IMAGES = frozenset({"thumbs.db", "desktop.ini"})
_ROWS_PER_TABLE = 100_000


def holds_classes(folder: Path) -> bool:
    """Whether some folder in it begins with an image, or with a folder of its own, which is refused when it is read."""
    return any(next(_list(inner), None) is not None for inner in _list(folder) if inner.is_dir())


def iterate_images(folder: Path) -> Iterator[dict[str, str]]:
    """The images, by class and then by name; paths are absolute.

    Raises:
        BadInput: naming the first file that is no image, or lies where it has no class, or the first class without images.
    """
    classes = sorted(path for path in _list(folder) if path.is_dir())
    if loose := next(
        (path for path in sorted(_list(folder)) if path.suffix.lower() in SUFFIXES and path.is_file()), None
    ):
        raise BadInput(f"{loose}: lies beside the folders of classes; move it into the folder of its class")
    for inner in classes:
        num_images = 0
        for path in sorted(_list(inner)):
            if path.is_dir():
                raise BadInput(
                    f"{path}: is a folder inside of {str(inner)!r}, which should hold the images of the class {inner.name!r}; "
                    "name the folder that holds the folders of classes, such as one for each split"
                )
            yield dict(zip(COLUMNS, (_show_image(path), inner.name), strict=True))
            num_images += 1
        if not num_images:
            raise BadInput(f"{inner}: holds no images of the class {inner.name!r}; remove the folder")


def iterate_new_images(folder: Path) -> Iterator[dict[str, str]]:
    """The images of a folder that holds nothing else, by name and without a class; of a folder of classes as `iterate_images`.

    Raises:
        BadInput: as `iterate_images`, or the folder holds none.
    """
    if any(path.is_dir() for path in _list(folder)):
        yield from iterate_images(folder)
        return
    paths = sorted(_list(folder))
    if not paths:
        raise BadInput(f"{folder}: holds no images")
    for path in paths:
        yield {COLUMNS[0]: _show_image(path)}


def iterate_tables(folder: Path) -> Iterator[pa.Table]:
    """The images as tables of texts.

    Raises:
        BadInput: as `iterate_images`.
    """
    import pyarrow as pa

    images = iterate_images(folder)
    while rows := list(islice(images, _ROWS_PER_TABLE)):
        yield pa.table({name: pa.array([row[name] for row in rows], pa.string()) for name in COLUMNS})


def _show_image(path: Path) -> str:
    """The whole path of an image.

    Raises:
        BadInput: it is none, or no table can hold its name.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise BadInput(f"{path}: is none of {', '.join(sorted(SUFFIXES))}; convert it, or move it elsewhere")
    whole = str(path.absolute())
    try:
        whole.encode()
    except UnicodeEncodeError:
        raise BadInput(f"{whole!r}: the bytes of its name are not UTF-8; rename it") from None
    return whole


def _list(folder: Path) -> Iterator[Path]:
    """What people have put there."""
    return (path for path in folder.iterdir() if not path.name.startswith(".") and path.name.lower() not in _NO_IMAGES)
