"""Which files a key names, and what is said of those that can't be used."""

from __future__ import annotations

from pathlib import Path

import pytest

from onecurve.training.data.sources import describe_missing_column, expand, find_files
from onecurve.training.errors import BadInput


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in (
        "reviews[1].csv",
        "reviews1.csv",
        "part-b.csv",
        "part-a.csv",
        "what?.csv",
        "a*.csv",
        "ab.csv",
        "x$Y.csv",
    ):
        (tmp_path / name).write_text("text,label\nx,0\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DATA", str(tmp_path))
    monkeypatch.delenv("NOWHERE", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("reviews[1].csv", ["reviews[1].csv"]), ("what?.csv", ["what?.csv"]), ("a*.csv", ["a*.csv"]),
        ("reviews[12].csv", ["reviews1.csv"]), ("part-*.csv", ["part-a.csv", "part-b.csv"]), ("**/ab.csv", ["ab.csv"]),
        ("~/ab.csv", ["ab.csv"]), ("$DATA/ab.csv", ["ab.csv"]), ("${DATA}/part-?.csv", ["part-a.csv", "part-b.csv"]),
        ("~/reviews[1].csv", ["reviews[1].csv"]), ("x$Y.csv", ["x$Y.csv"]), ("none-*.csv", []), ("no.csv", ["no.csv"]),
        ("~/no.csv", ["no.csv"]), ("$NOWHERE/ab.csv", ["$NOWHERE/ab.csv"]),
    ],
)  # fmt: skip
def test_the_file_of_this_name_comes_before_a_pattern(pattern: str, expected: list[str], folder: Path) -> None:
    found = [path if path.is_absolute() else folder / path for path in expand(pattern)]
    assert found == [folder / name for name in expected]


@pytest.mark.parametrize(
    ("patterns", "said"),
    [
        (["none-*.csv"], "none-*.csv"), (["part-c.csv"], "did you mean 'part-"), ([".jsonl/"], "does not exist"),
        (["$NOWHERE/ab.csv"], "$NOWHERE is not set"), (["empty.csv"], "is empty"), (["sub.csv"], "is a folder"),
        (["a.xlsx"], "is none of .csv"), (["ab.csv", "b.jsonl"], "csv, json"),
    ],
)  # fmt: skip
def test_a_file_that_can_not_be_used_is_named(patterns: list[str], said: str, folder: Path) -> None:
    for name in ("a.xlsx", "b.jsonl"):
        (folder / name).write_text("x")
    (folder / "empty.csv").touch()
    (folder / "sub.csv").mkdir()
    with pytest.raises(BadInput) as caught:
        find_files("train_file", patterns)
    assert str(caught.value).startswith("train_file: ")
    assert said in str(caught.value)


def test_files_come_in_the_order_of_their_patterns(folder: Path) -> None:
    assert [path.name for path in find_files("train_file", ["reviews1.csv", "part-*.csv"])] == [
        "reviews1.csv", "part-a.csv", "part-b.csv",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        (["text;label"], "semicolons"), (["text\tlabel"], "tabs"), (["text|label"], "vertical bars"),
        (["txt", "label"], "did you mean txt"), (["a", "b"], "it has a, b"),
    ],
)  # fmt: skip
def test_a_missing_column_is_explained(columns: list[str], said: str) -> None:
    message = describe_missing_column("a.csv", "text_column", "text", columns)
    assert message.startswith("a.csv: text_column 'text' ")
    assert said in message
