"""One reader for all: every cell comes back as it was written, or the file is refused by line or row."""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from onecurve.training.data import csv_blocks, json_blocks
from onecurve.training.data.parquet_rows import find_class_names
from onecurve.training.data.tables import count_rows, read_chunks, read_head, read_table
from onecurve.training.errors import BadInput
from tests.messages import names, naming

Read = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Write files and read them as one table."""

    def write_and_read(*contents: str | bytes, suffix: str = ".csv") -> list[dict[str, Any]]:
        paths = []
        for number, content in enumerate(contents):
            paths.append(tmp_path / f"{'abc'[number]}{suffix}")
            paths[-1].write_bytes(content if isinstance(content, bytes) else content.encode())
        table = read_table(paths, tmp_path / "scratch")
        assert (
            len(table) == sum(map(count_rows, paths)) == sum(len(rows) for path in paths for rows in read_chunks(path))
        )
        rows: list[dict[str, Any]] = table.to_pylist()
        return rows

    return write_and_read


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def labels(*values: Any) -> str:
    return lines(*({"text": "x", "label": value} for value in values))


# CSV -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "label",
    [
        "007",
        "008",
        "NA",
        "None",
        "nan",
        "null",
        "1e5",
        "True",
        "-0",
        "1.0",
        "2024-01-01",
        " pos",
        "pos ",
        '5" pipe',
        "\u2028",
    ],
)
def test_a_cell_of_a_text_file_is_text(label: str, read: Read) -> None:
    assert read(f"text,label\nx,{label}\ny,1\n") == [{"text": "x", "label": label}, {"text": "y", "label": "1"}]
    assert read(f"text\tlabel\nx\t{label}\n", suffix=".tsv") == [{"text": "x", "label": label}]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("text,label\nx,\n,y\n", [("x", None), (None, "y")]),
        ('text,label\n"",""\n', [(None, None)]),
        ("text,label\nx,0\n\n\ny,1\n\n", [("x", "0"), ("y", "1")]),
        ("text,label\r\nx,0\r\n\r\ny,1", [("x", "0"), ("y", "1")]),
        ('text,label\n"a\r\nb\rc\n",0\n', [("a\r\nb\rc\n", "0")]),
        ('text,label\n"say ""hi"", he said","x, y"\n', [('say "hi", he said', "x, y")]),
        ('text,label\nsay "hi",0\n"a",1\n', [('say "hi"', "0"), ("a", "1")]),
        ('\ufefftext,label\nx,0\n\ufeffy,1\n', [("x", "0"), ("\ufeffy", "1")]),
        ('text,label\n\ufeffy,1\n', [("\ufeffy", "1")]),
        ('\ufeff"text","label"\nx,0\n', [("x", "0")]),
        ("\ntext,label\nx,0\n", [("x", "0")]),
        ("text,label\n" + "x" * 300_000 + ",0\n", [("x" * 300_000, "0")]),
        ("text,label\n", []),
    ],
)  # fmt: skip
def test_csv_as_it_is_written(content: str, expected: list[tuple[str | None, str | None]], read: Read) -> None:
    assert [tuple(row.values()) for row in read(content)] == expected


def test_a_blank_line_of_one_column_is_an_empty_cell(read: Read) -> None:
    assert [row["text"] for row in read("text\na\n\nb\n\n")] == ["a", None, "b", None]
    assert [row["text"] for row in read("text\r\na\r\n\r\nb")] == ["a", None, "b"]


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ('text,label\na,neg\n"b,pos\nc,neg\n"d,pos\n', ("line 3",)),
        ('text,label\na,neg\n"b,pos\nc,neg\n', ("line 3",)),
        ('text,label\na,"neg\nb,pos\n', ("line 2",)),
        ('text,label\n"a",neg\n"b ""c""",neg\n"d\ne",pos\nf,"x\n', ("line 6",)),
        ('text,label\n"a" b,neg\n', ("line 2",)),
        ("text,label\nthe, match ended,neg\n", ("line 2", "3 fields", "has 2")),
        ("text,label\na,neg\nb\n", ("line 3", "1 fields", "has 2")),
        ('text,label\n"a\nb",neg\nc,d,e\n', ("line 4", "3 fields", "has 2")),
        ("text,label\na,0\n   \n", ("line 3", "1 fields", "has 2")),
        ("text;label\na;0\nb, c;0\n", ("line 3", "2 fields", "has 1")),
        ("text,label,label\na,0,1\n", ("'label'",)),
        ("text,label,\na,0,\n", ("column 3",)),
        (",text\n0,a\n", ("column 1",)),
        ("text,label\na,0\nb\0,1\n", ("line 3",)),
        ("text,label\na,0\rb,1\n", ("line 2",)),
        ("text,label\ra,0\r", ("line 1",)),
        (b"text,label\na,0\ncaf\xe9,1\n", ("line 3: byte 0xe9",)),
        ("text,label\na,0\n".encode("utf-16"), ("line 1: byte 0xff",)),
    ],
)  # fmt: skip
def test_a_wrong_csv_is_refused_with_its_line(content: str | bytes, place: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    said = set()
    for attempt in (
        lambda: read_table([path], tmp_path),
        lambda: list(read_chunks(path)),
        lambda: read_head(path, 99),
    ):
        with pytest.raises(BadInput) as caught:
            attempt()
        said.add(str(caught.value))
    message = said.pop()
    assert f"{path}" in message
    assert names(message, *place)
    assert not said, "training, predict and check use the same words"


def test_semicolons_are_suspected(read: Read) -> None:
    with pytest.raises(BadInput, match="semicolons"):
        read("text;label\na, b;0\n")


@pytest.mark.parametrize("size", [64, 1_000, 30_000])
def test_a_fault_is_found_however_far_down_it_stands(size: int, read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_blocks, "BYTES_PER_BLOCK", size)
    good = "".join(f'"text, {number}\nand ""more""",{number:03}\n' for number in range(1_000))
    rows = read(f"text,label\n{good}")
    assert [row["label"] for row in rows] == [f"{number:03}" for number in range(1_000)]
    assert rows[999]["text"] == 'text, 999\nand "more"'
    for fault, line in (('"open,1\n', 2_002), ("one\n", 2_002), ("x\0,1\n", 2_002), ('a,1\n"b" c,1\n', 2_003)):
        with pytest.raises(BadInput, match=rf"line {line}\b"):
            read(f"text,label\n{good}{fault}{good}")


def test_quotes_inside_unquoted_cells_do_not_hide_rows(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_blocks, "BYTES_PER_BLOCK", 256)
    rows = [(f'a {number}" pipe' if number % 3 else f'"quoted, {number}"', str(number)) for number in range(999)]
    found = read("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    assert [tuple(row.values()) for row in found] == [
        (text.strip('"') if text[0] == '"' else text, label) for text, label in rows
    ]


# JSON ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        ["2024-01-01", "2024-02-30", "x"], ["2024-01-01T00:00:00Z"], [0, 1], [1, 2.5, None], [True, None, False],
        ["0", "1"], [None, "a"], [[0, 1], [], [None]], [["2024-01-01"], None], [{"a": 1}, {"b": ["x"]}, {}], [None],
        [[]], [{}], ["\u0000", "\ud83d\ude00"], [2**63 - 1, -(2**63)], [2**53, 0.5], [1e300, -0.0], [[[1]], [[2.5]]],
    ],
)  # fmt: skip
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_json_keeps_its_kinds(values: list[Any], suffix: str, read: Read) -> None:
    rows = [{"text": "x", "label": value} for value in values]
    content = lines(*rows) if suffix == ".jsonl" else json.dumps(rows, indent=1)
    found = [row["label"] for row in read(content, suffix=suffix)]
    assert json.dumps(prune(found)) == json.dumps(prune([unify(value, values) for value in values]))


def unify(value: Any, values: list[Any]) -> Any:
    """A number beside decimals is one."""
    kinds = json.dumps(values)
    if isinstance(value, list):
        return [unify(inner, values) for inner in value]
    return float(value) if type(value) is int and ("." in kinds or "e+" in kinds) else value


def prune(value: Any) -> Any:
    """Arrow gives every object all keys; those that are null are as good as missing."""
    if isinstance(value, dict):
        return {key: prune(inner) for key, inner in value.items() if inner is not None}
    return [prune(inner) for inner in value] if isinstance(value, list) else value


@pytest.mark.parametrize(
    ("values", "row", "kinds"),
    [
        ([0, "0"], 2, ("number", "text")),
        (["0", 0], 2, ("text", "number")),
        ([1, 1, True], 3, ("number", "boolean")),
        (["a", ["a"]], 2, ("text", "list")),
        (["a", {"a": 1}], 2, ("text", "object")),
        ([None, 1, None, "1"], 4, ("number", "text")),
        ([["a"], [1]], 2, ("text", "number")),
        ([[1, "a"]], 1, ("number", "text")),
        ([{"a": 1}, {"a": "1"}], 2, ("number", "text")),
    ],
)
@pytest.mark.parametrize("num_before", [0, 5_000])
def test_mixed_kinds_are_refused_by_row(
    values: list[Any], row: int, kinds: tuple[str, str], num_before: int, read: Read, tmp_path: Path
) -> None:
    before = [None] * num_before
    for suffix, content in ((".jsonl", labels(*before, *values)), (".json", f"[{labels(*before, *values)[:-1]}]")):
        if suffix == ".json":
            content = content.replace("}\n{", "},\n{")
        with pytest.raises(BadInput, match=rf"a{suffix}, row {num_before + row}: column 'label'") as caught:
            read(content, suffix=suffix)
        assert all(kind in str(caught.value) for kind in kinds)
    if not num_before:
        with pytest.raises(BadInput, match=rf"row {row}: column 'label'"):
            read_head(tmp_path / "a.jsonl", 99)


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ('{"text": "x", "text": "y"}', "'text' twice"), ('{"a": {"b": 1, "b": 1}}', "'b' twice"),
        ('{"label": NaN}', "NaN"), ('{"label": -Infinity}', "-Infinity"), ('{"text": "\\ud800"}', "surrogate"),
        ('{"\\udfff": 1}', "surrogate"), ('{"text": "a\tb"}', "not valid JSON"), ('{"a": 1} {"a": 1}', "not valid JSON"),
        ('{"a": 01}', "not valid JSON"), ("[1]", "list"), ('"x"', "str"), ("null", "NoneType"), ('{"a": ', "not valid JSON"),
        ("{'a': 1}", "not valid JSON"), ('{"a": "\x00"}', "NUL"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("num_before", [1, 5_000])
def test_a_wrong_line_is_refused(line: str, cause: str, num_before: int, read: Read) -> None:
    content = '{"text": "x"}\n' * num_before + line + '\n{"text": "x"}\n'
    with pytest.raises(BadInput, match=rf"a\.jsonl, line {num_before + 1}: ") as caught:
        read(content, suffix=".jsonl")
    assert cause in str(caught.value)


@pytest.mark.parametrize(
    "value", ["9223372036854775808", "1e999", "[1, 1e999]", '12345678901234567890.5, "b": 9223372036854775808']
)
def test_a_number_that_64_bits_can_not_hold_is_refused(value: str, read: Read) -> None:
    with pytest.raises(BadInput, match=r"a\.jsonl, row 2: column"):
        read(f'{{"a": 1}}\n{{"a": {value}}}\n', suffix=".jsonl")


def test_integers_that_decimals_would_round_are_refused(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_blocks, "BYTES_PER_BLOCK", 1_000)
    with pytest.raises(BadInput):
        read(labels(2**53 + 1, 0.5), suffix=".jsonl")
    with pytest.raises(BadInput):
        read(labels(*[2**53 + 1] * 300, *[0.5] * 300), suffix=".jsonl")


def test_what_is_nested_too_deeply_is_refused(read: Read) -> None:
    for depth in (50, 900, 100_000):
        with pytest.raises(BadInput, match=r"line 2|row 2"):
            read('{"a": 1}\n{"b": ' + "[" * depth + "]" * depth + "}\n", suffix=".jsonl")


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ('[{"a": 1}, 5]', "row 2"), ('[{"a": 1},\n {"a": }]', "row 2 (line 2)"), ('[{"a": 1}', "row 1"),
        ('[{"a": 1}]\n[]', "row 1"), ('[{"a": 1},]', "row 2"), ("[{}, null]", "row 2"), ("[", "row 1"),
        ('[{"a": "open}, {"a": 1}]', "row 1"), ('[{"a": 1} {"a": 1}]', "row 1"), ('[{"a": NaN}]', "row 1"),
        ('[{"a": 1, "a": 2}]', "row 1"), ('[{"a": "\\ud800"}]', "row 1"), (b'[{"a": 1},\n{"a": "\xff"}]', "line 2"),
    ],
)  # fmt: skip
def test_a_wrong_array_is_refused(content: str | bytes, place: str, read: Read) -> None:
    with pytest.raises(BadInput) as caught:
        read(content, suffix=".json")
    assert place in str(caught.value)


@pytest.mark.parametrize("size", [1, 7, 100])
def test_an_array_is_read_in_parts(size: int, read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": f'a "{number}" \\ é😀', "label": [number + 0.5, -1.5]} for number in range(50)]
    monkeypatch.setattr("onecurve.training.data.json_rows.BYTES_PER_BLOCK", size)
    for indent in (None, 2):
        assert read(json.dumps(rows, indent=indent), suffix=".json") == rows
    assert read("\ufeff  [ ]\n", suffix=".json") == []


def test_late_and_rare_kinds(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_blocks, "BYTES_PER_BLOCK", 1_000)
    values = [None] * 500 + [1] * 500 + [None] * 500 + [2.5] + [3] * 500
    assert [row["label"] for row in read(labels(*values), suffix=".jsonl")] == [
        None if value is None else float(value) for value in values
    ]
    rows: list[dict[str, Any]] = [{"a": {"b": 1}}] * 500 + [{"a": {"c": ["x"]}, "d": "2024-01-01"}] * 500
    found = read(lines(*rows), suffix=".jsonl")
    assert prune(found) == rows
    assert read("\n" + lines(*rows) + " \r\n\n", suffix=".jsonl") == found


# Several files -------------------------------------------------------------------------------------------------------


def test_files_are_read_as_one(read: Read) -> None:
    assert read("text,label\nx,True\n", "label,text\nUnknown,y\n") == [
        {"text": "x", "label": "True"}, {"text": "y", "label": "Unknown"},
    ]  # fmt: skip
    assert [row["label"] for row in read(labels(None), labels(1), labels(2.5), suffix=".jsonl")] == [None, 1.0, 2.5]
    assert read('{"a": 1}\n', '{"b": "x"}\n', suffix=".jsonl") == [{"a": 1, "b": None}, {"a": None, "b": "x"}]
    with pytest.raises(BadInput, match=naming("b.csv", "label", "lable")):
        read("text,label\nx,0\n", "text,lable\nx,0\n")
    with pytest.raises(BadInput, match=r"b\.jsonl, row 1: column 'label'"):
        read(labels(1), labels("1"), suffix=".jsonl")


# Parquet -------------------------------------------------------------------------------------------------------------


def test_parquet_keeps_its_types(tmp_path: Path) -> None:
    table = pa.table(
        {
            "text": pa.array(["a", None, "b"] * 1_000).dictionary_encode(),
            "label": pa.array([1, 2, None] * 1_000, pa.int8()),
            "large": pa.array(["x"] * 3_000, pa.large_string()),
            "day": pa.array([0, 1, 2] * 1_000, pa.date32()),
            "tags": pa.array([["a"], [], None] * 1_000),
        }
    )
    paths = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    pa.parquet.write_table(table, paths[0], row_group_size=700)
    pa.parquet.write_table(table.select(["tags", "day", "large", "label", "text"]), paths[1])
    found = read_table(paths, tmp_path)
    assert found.to_pylist() == table.to_pylist() * 2
    assert found.schema.types == [pa.string(), pa.int8(), pa.large_string(), pa.date32(), pa.list_(pa.string())]
    assert count_rows(paths[0]) == 3_000
    assert read_head(paths[0], 2).columns == table.column_names
    wider = table.set_column(1, "label", pa.array([2**40] * 3_000))
    pa.parquet.write_table(wider, paths[1])
    assert read_table(paths, tmp_path).column("label").to_pylist() == [1, 2, None] * 1_000 + [2**40] * 3_000
    pa.parquet.write_table(table.set_column(1, "label", pa.array(["1"] * 3_000)), paths[1])
    with pytest.raises(BadInput, match=naming("b.parquet", "'label'")):
        read_table(paths, tmp_path)


def test_names_of_classes_are_kept_and_must_agree(tmp_path: Path) -> None:
    def write(path: Path, names: list[str]) -> Path:
        features = {"label": {"names": names, "_type": "ClassLabel"}, "text": {"dtype": "string", "_type": "Value"}}
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        pa.parquet.write_table(pa.table({"label": [0, 1], "text": ["a", "b"]}).replace_schema_metadata(metadata), path)
        return path

    paths = [write(tmp_path / "a.parquet", ["no", "yes"]), write(tmp_path / "b.parquet", ["no", "yes"])]
    assert find_class_names(read_table(paths, tmp_path)) == {"label": ["no", "yes"]}
    write(paths[1], ["yes", "no"])
    with pytest.raises(BadInput, match=r"b\.parquet"):
        read_table(paths, tmp_path)


def test_a_broken_parquet_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"x")
    with pytest.raises(BadInput, match=r"a\.parquet"):
        read_table([path], tmp_path)
    pa.parquet.write_table(pa.table([["a"], ["b"]], names=["text", "text"]), path)
    with pytest.raises(BadInput, match="'text'"):
        read_table([path], tmp_path)
    invalid = pa.array([b"ok", b"\xff\xfe"]).view(pa.string())
    pa.parquet.write_table(pa.table({"text": invalid}), path)
    with pytest.raises(BadInput, match="rows 1 to 2"):
        read_table([path], tmp_path)


# Any table that the standard library writes --------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_quick_and_careful_reading_agree_on_a_long_table(
    seed: int, read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = random.Random(seed)
    pieces = ["a", "é", '"', ",", "\n", "\r\n", "\r", " ", "", "😀", "\t", "word word"]
    rows = [["".join(generator.choices(pieces, k=generator.randint(0, 6))) for _ in range(3)] for _ in range(2_000)]
    monkeypatch.setattr(csv_blocks, "BYTES_PER_BLOCK", generator.randint(50, 5_000))
    for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL):
        for ending in ("\n", "\r\n"):
            file = io.StringIO(newline="")
            # csv leaves a lone carriage return unquoted where lines end with line feeds.
            csv.writer(file, quoting=quoting, lineterminator=ending).writerows(
                [["x", "y", "z"], *([cell.replace("\r", "") for cell in row] for row in rows)]
                if quoting == csv.QUOTE_MINIMAL
                else [["x", "y", "z"], *rows]
            )
            expected = list(csv.reader(io.StringIO(file.getvalue(), newline=""), strict=True))[1:]
            found = [[cell or "" for cell in row.values()] for row in read(file.getvalue())]
            assert found == expected
