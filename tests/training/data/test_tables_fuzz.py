"""Whatever the standard library writes comes back cell by cell; whatever is damaged is read right or refused by place."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from onecurve.training.data import csv_blocks, json_blocks, json_rows
from onecurve.training.data.tables import count_rows, read_chunks, read_table
from onecurve.training.errors import BadInput

quickly = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

TRICKY = [
    "",
    '"',
    '""',
    ",",
    "\t",
    "\n",
    "\r\n",
    "\r",
    " ",
    "\ufeff",
    "NA",
    "007",
    "2024-01-01",
    "é",
    "😀",
    "\u2028",
    ";",
]
texts = st.lists(st.one_of(st.sampled_from(TRICKY), st.text(max_size=3)), max_size=5).map("".join)
# UTF-8 has no halves of surrogate pairs, and a NUL in a text file is refused.
cells = texts.map(lambda text: re.sub("[\ud800-\udfff\0]", "", text))
names = st.lists(st.sampled_from(["text", "label", "a,b", 'q"', "ü", "id\n"]), min_size=1, max_size=4, unique=True)
block_sizes = st.sampled_from([1, 16, 200, 8 << 20])

integers = st.integers(-(2**63), 2**63 - 1)
decimals = st.floats(allow_nan=False, allow_infinity=False)
simple = st.sampled_from([cells, integers, decimals, st.booleans(), st.none()])


@st.composite
def columns_of_json(draw: st.DrawFn, num_rows: int) -> list[Any]:
    """Values of one kind, null among them."""
    kind = draw(simple)
    shape = draw(st.sampled_from(["plain", "list", "object"]))
    if shape == "list":
        kind = st.lists(st.none() | kind, max_size=3)
    elif shape == "object":
        kind = st.fixed_dictionaries({}, optional={"x": kind, "y": cells})
    return draw(st.lists(st.none() | kind, min_size=num_rows, max_size=num_rows))


@st.composite
def rows_of_json(draw: st.DrawFn) -> list[dict[str, Any]]:
    num_rows = draw(st.integers(0, 6))
    columns = {name: draw(columns_of_json(num_rows)) for name in draw(names)}
    rows = [{name: values[number] for name, values in columns.items()} for number in range(num_rows)]
    return [{name: value for name, value in row.items() if value is not None or draw(st.booleans())} for row in rows]


@contextmanager
def blocks_of(size: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in (csv_blocks, json_blocks, json_rows):
            patch.setattr(module, "BYTES_PER_BLOCK", size)
        yield


def read(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = read_table([path], path.parent / "scratch").to_pylist()
    assert len(rows) == count_rows(path)
    return rows


def prune(value: Any) -> Any:
    """Without keys that are null: they are as good as missing. -0.0 keeps its sign, a number its kind."""
    if isinstance(value, dict):
        return {key: prune(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [prune(inner) for inner in value]
    return (type(value).__name__, value, math.copysign(1, value)) if isinstance(value, float) else value


@quickly
@given(
    columns=names,
    data=st.data(),
    quoting=st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]),
    ending=st.sampled_from(["\n", "\r\n"]),
    size=block_sizes,
)
def test_text_tables_come_back(
    columns: list[str], data: st.DataObject, quoting: Any, ending: str, size: int, tmp_path: Path
) -> None:
    rows = data.draw(st.lists(st.lists(cells, min_size=len(columns), max_size=len(columns)), max_size=6))
    if quoting == csv.QUOTE_MINIMAL:  # Then csv leaves a lone carriage return unquoted, which no reader could tell.
        rows = [[cell.replace("\r", "") for cell in row] for row in rows]
    for suffix, delimiter in ((".csv", ","), (".tsv", "\t")):
        path = tmp_path / f"a{suffix}"
        with path.open("w", newline="", encoding=data.draw(st.sampled_from(["utf-8", "utf-8-sig"]))) as file:
            csv.writer(file, delimiter=delimiter, quoting=quoting, lineterminator=ending).writerows([columns, *rows])
        with blocks_of(size):
            assert [list(row.values()) for row in read(path)] == [[cell or None for cell in row] for row in rows]
        assert [list(row.values()) for chunk in read_chunks(path) for row in chunk] == rows


@quickly
@given(rows=rows_of_json(), is_ascii=st.booleans(), size=block_sizes, is_array=st.booleans())
def test_json_comes_back(rows: list[dict[str, Any]], is_ascii: bool, size: int, is_array: bool, tmp_path: Path) -> None:
    assume(not rows or rows[0])  # A first block of objects without a key is refused.
    path = tmp_path / "a.json"
    if is_array:
        path.write_text(json.dumps(rows, ensure_ascii=is_ascii), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row, ensure_ascii=is_ascii) + "\n" for row in rows), encoding="utf-8")
    with blocks_of(size):
        assert prune(read(path)) == prune(rows)


@quickly
@given(rows=rows_of_json())
def test_parquet_comes_back(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    assume(any(rows) or not rows)
    schema = pa.schema([])
    table = json_blocks.build_table(tmp_path, rows, schema, 0)
    if (
        any(pa.types.is_struct(field.type) and not field.type.num_fields for field in table.schema)
        or not table.num_columns
    ):
        return  # Parquet has no object without keys, and no table without columns.
    path = tmp_path / "a.parquet"
    pa.parquet.write_table(table, path, row_group_size=2)
    assert prune(read(path)) == prune(rows)


damages = st.lists(
    st.tuples(st.sampled_from(["flip", "cut", "insert"]), st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=2)),
    min_size=1, max_size=2,
)  # fmt: skip
# What breaks a table most easily.
structure = st.sampled_from(
    [b'"', b",", b"\n", b"\r", b"\0", b"{", b"}", b"[", b"]", b":", b"\\", b"\xff", b"1", b"\xef\xbb\xbf"]
)


def damage(content: bytes, kind: str, where: float, octets: bytes) -> bytes:
    position = int(where * len(content))
    if kind == "insert":
        return content[:position] + octets + content[position:]
    return content[:position] + (octets[:1] if kind == "flip" else b"") + content[position + len(octets) :]


def read_with_csv(content: bytes) -> list[list[str]] | None:
    """What RFC 4180 makes of it, by the standard library; None where it has no answer."""
    try:
        text = content.decode("utf-8-sig")
        rows = list(csv.reader(re.findall(r"[^\n]*\n|[^\n]+", text), strict=True))
    except (UnicodeDecodeError, csv.Error):
        return None
    while rows and not rows[0]:
        rows.pop(0)
    rows = [row for row in rows if row or len(rows[0]) == 1]
    if "\0" in text or len(set(rows[0] if rows else [])) != len(rows[0] if rows else []):
        return None
    if rows and (not all(name.strip() for name in rows[0]) or {len(row) or 1 for row in rows} != {len(rows[0])}):
        return None
    return [row or [""] for row in rows[1:]]


@quickly
@given(data=st.data(), kinds=damages, octets=st.lists(structure, min_size=2, max_size=2), size=block_sizes)
def test_a_damaged_csv_is_read_right_or_refused(
    data: st.DataObject, kinds: list[tuple[str, float, bytes]], octets: list[bytes], size: int, tmp_path: Path
) -> None:
    rows = data.draw(st.lists(st.lists(cells, min_size=2, max_size=2), min_size=1, max_size=6))
    file = io.StringIO(newline="")
    csv.writer(file, lineterminator="\n").writerows([["text", "label"], *rows])
    content = file.getvalue().encode()
    for (kind, where, _), inserted in zip(kinds, octets, strict=False):
        content = damage(content, kind, where, inserted)
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    expected = read_with_csv(content)
    with blocks_of(size):
        found, refusal = try_to_read(path)
    if found is not None:
        assert [[cell or "" for cell in row.values()] for row in found] == expected, content
    else:
        assert expected is None, f"{content!r} is {expected}, refused as {refusal}"
        assert "a.csv" in refusal
        assert re.search(r"line \d+|columns? ", refusal)


def try_to_read(path: Path) -> tuple[list[dict[str, Any]] | None, str]:
    """Rows, or why there are none."""
    try:
        return read(path), ""
    except BadInput as error:
        return None, str(error)


def read_with_json(content: bytes) -> list[dict[str, Any]] | None:
    """Rows of JSON Lines by the standard library; None where a line is no object or is doubtful."""

    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        assert len(dict(pairs)) == len(pairs)
        return dict(pairs)

    def refuse(_: str) -> None:
        raise AssertionError

    try:
        lines = [line for line in content.decode("utf-8-sig").split("\n") if line.strip(" \t\r")]
        rows = [json.loads(line, object_pairs_hook=build, parse_constant=refuse) for line in lines]
        json.dumps(rows, ensure_ascii=False).encode()
    except (ValueError, AssertionError):
        return None
    return rows if all(isinstance(row, dict) for row in rows) else None


@quickly
@given(rows=rows_of_json(), kinds=damages, octets=st.lists(structure, min_size=2, max_size=2), size=block_sizes)
def test_damaged_json_is_read_right_or_refused(
    rows: list[dict[str, Any]], kinds: list[tuple[str, float, bytes]], octets: list[bytes], size: int, tmp_path: Path
) -> None:
    content = "".join(json.dumps(row) + "\n" for row in [{"text": "x"}, *rows]).encode()
    for (kind, where, _), inserted in zip(kinds, octets, strict=False):
        content = damage(content, kind, where, inserted)
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    expected = read_with_json(content)
    with blocks_of(size):
        found, refusal = try_to_read(path)
    if found is not None:
        assert expected is not None, content
        assert number_free(prune(found)) == number_free(prune(expected)), content
    else:
        # Two kinds in a column, or a number beyond 64 bits, are refused by row though each line is JSON.
        assert re.search(
            r"a\.jsonl, " + (r"(line|row) \d+" if expected is None else r"row \d+: (column|has no keys)"), refusal
        )


def number_free(value: Any) -> Any:
    """Damage may turn an integer column into one of numbers."""
    if isinstance(value, dict):
        return {key: number_free(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [number_free(inner) for inner in value]
    if isinstance(value, tuple):
        return ("number", value[1])
    return ("number", value) if type(value) is int else value


@quickly
@given(where=st.floats(0, 1, exclude_max=True))
def test_a_cut_parquet_file_is_refused(where: float, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pa.parquet.write_table(pa.table({"text": ["a", "b"], "label": [1, 2]}), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(where * len(whole))])
    with pytest.raises(BadInput, match=r"a\.parquet"):
        read(path)
