"""Folders of images: a row for each image with its class; what is none, or has no class, is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from onecurve.training.data.sources import find_files
from onecurve.training.data.tables import count_rows, read_chunks, read_head, read_table
from onecurve.training.errors import BadInput
from tests.messages import naming


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes, and what systems leave beside images."""
    for name in ("cats/b.JPG", "cats/a.png", "birds/c.webp", "birds/Thumbs.db", "birds/.hidden", ".git/x", "README.md"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return tmp_path / "images"


def test_rows_are_images_with_their_class_in_the_order_of_names(folder: Path, tmp_path: Path) -> None:
    expected = [
        {"image": str(folder / name), "label": label}
        for name, label in (("birds/c.webp", "birds"), ("cats/a.png", "cats"), ("cats/b.JPG", "cats"))
    ]
    [path] = find_files("train_file", [str(folder)])
    assert [row for chunk in read_chunks(path) for row in chunk] == expected
    assert read_table([path], tmp_path / "scratch").to_pylist() == expected
    assert count_rows(path) == 3
    assert (read_head(path, 2).rows, read_head(path, 2).columns) == (expected[:2], ["image", "label"])


def add(name: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")

    return write


FAULTS: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "a file that is no image": (add("cats/notes.txt"), ("notes.txt", ".png")),
    "an image without a class": (add("loose.png"), ("loose.png",)),
    "folders of splits": (add("train/cats/a.png"), ("train/cats", "'train'")),
    "a class without images": (lambda folder: (folder / "dogs").mkdir(), ("dogs",)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_has_no_class_or_is_no_image_is_refused(folder: Path, fault: str) -> None:
    spoil, needed = FAULTS[fault]
    spoil(folder)
    with pytest.raises(BadInput, match=naming(*needed)):
        list(read_chunks(folder))


def test_a_folder_without_classes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty" / "inner").mkdir(parents=True)
    with pytest.raises(BadInput, match=naming("train_file", "dataset_name")):
        find_files("train_file", [str(tmp_path / "empty")])
