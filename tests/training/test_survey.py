"""A survey: every row is counted, few are kept, spread evenly; it survives JSON."""

from __future__ import annotations

import itertools
import json

from onecurve.training.survey import Survey, survey_rows


def test_every_row_is_counted_and_few_are_kept() -> None:
    """Sorted by label: a survey of the first rows alone would see one class."""
    table = survey_rows({"text": f"text {number}", "label": number // 2_500} for number in range(10_000))
    label = table.find("label")
    assert label is not None
    assert (table.num_rows, table.is_whole, dict(label.counts or ())) == (10_000, True, dict.fromkeys(range(4), 2_500))
    assert 1_000 <= len(table.rows) < 2_000
    kept = [int(row["text"].split()[1]) for row in table.rows]
    assert {after - before for before, after in itertools.pairwise(kept)} == {8}


def test_reading_ends_where_it_should() -> None:
    rows = iter([{"a": number} for number in range(10)])
    table = survey_rows(rows, max_rows=4)
    assert (table.num_rows, table.is_whole) == (4, False)


def test_values_are_what_they_are() -> None:
    rows = [
        {"cell": "", "word": "x", "list": ["a", "b"], "image": {"bytes": b"", "path": "a.png"}, "number": 1},
        {"cell": "7", "word": "y", "list": ["a"], "image": {"bytes": b"", "path": None}, "number": 1.5, "late": True},
    ]
    table = survey_rows(rows)
    assert {column.name: column.kinds for column in table.columns} == {
        "cell": ("text",), "word": ("text",), "list": ("list of text",), "image": ("image",),
        "number": ("decimal", "integer"), "late": ("boolean",),
    }  # fmt: skip
    by_name = {column.name: column for column in table.columns}
    assert (by_name["cell"].num_filled, by_name["cell"].values) == (1, (None, "7"))
    assert dict(by_name["list"].counts or ()) == {"a": 2, "b": 1}
    assert (by_name["cell"].numbers, by_name["word"].numbers) == ([7.0], None)
    assert by_name["late"].values == (None, True)


def test_too_many_different_values_are_not_counted() -> None:
    table = survey_rows({"few": number % 1_000, "many": number % 1_001} for number in range(3_000))
    assert [column.num_distinct for column in table.columns] == [1_000, None]


def test_a_survey_survives_json() -> None:
    table = survey_rows([{"text": "a b", "label": 1, "tags": ["x"]}, {"text": "c", "label": 0, "tags": None}])
    named = table.with_class_names({"label": ["no", "yes"]})
    assert Survey.from_json(json.loads(json.dumps(named.to_json()))) == named
    assert [column.class_names for column in named.columns] == [(), ("no", "yes"), ()]
