"""What a table holds, column by column: kinds of values, how often each stands there, some rows. Tasks judge a table by it.

Rows are read once and not kept: a file may exceed memory. Only `_MAX_ROWS_KEPT` of them stay, spread evenly over those read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

TEXT, INTEGER, DECIMAL, BOOLEAN, LIST, OBJECT, IMAGE = (
    "text", "integer", "decimal", "boolean", "list", "object", "image",
)  # fmt: skip

MAX_ROWS_READ = 200_000
_MAX_ROWS_KEPT = 1_000
_MAX_DISTINCT = 1_000
_LONGEST_COUNTED = 100
_KINDS = {str: TEXT, int: INTEGER, float: DECIMAL, bool: BOOLEAN, list: LIST, dict: OBJECT}
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        kinds: of its values, empty ones left out; of lists also what they hold, as "list of text".
        num_filled: rows that have a value.
        values: of the kept rows, in their order; None where it is empty.
        counts: rows by value, over all rows read; of lists how often each item stands in them. None where there are too many
            different values, or none that can be counted.
        class_names: names of the numbers, where the data set's schema has some.
    """

    name: str
    kinds: tuple[str, ...]
    num_filled: int
    values: tuple[Any, ...]
    counts: tuple[tuple[Any, int], ...] | None
    class_names: tuple[str, ...] = ()

    def holds(self, *kinds: str) -> bool:
        """Whether it has values, all of these kinds."""
        return bool(self.kinds) and set(self.kinds) <= set(kinds)

    @cached_property
    def filled(self) -> list[Any]:
        """Values of the kept rows that have one."""
        return [value for value in self.values if value is not None]

    @cached_property
    def mean_words(self) -> float:
        """Words of a text, on average over the kept rows; 0 of anything but texts."""
        words = [len(value.split()) or 1 for value in self.filled if isinstance(value, str)]
        return sum(words) / len(words) if words else 0.0

    @cached_property
    def numbers(self) -> list[float] | None:
        """The kept values as numbers, also where texts write them, as in a CSV file; None where one is no number."""
        if not self.holds(INTEGER, DECIMAL) and not self.holds(TEXT):
            return None
        try:
            return [float(value) for value in self.filled]
        except ValueError:
            return None

    @property
    def num_distinct(self) -> int | None:
        """Different values; None for too many to count."""
        return None if self.counts is None else len(self.counts)

    def describe(self) -> str:
        """Kind, and how many different values or how long its texts are, in a few words."""
        kind = " and ".join(self.kinds) or "empty"
        if self.holds(TEXT) and self.numbers:
            kind = "numbers as text"
        repeats = self.counts is not None and self.num_filled >= 2 * len(self.counts)
        if self.counts and len(self.counts) <= _MAX_DISTINCT // 10 and (repeats or not self.mean_words):
            return f"{kind}, {len(self.counts)} different value{'s' * (len(self.counts) != 1)}"
        if self.mean_words and self.numbers is None:
            return f"{kind}, {self.mean_words:,.0f} word{'s' * (round(self.mean_words) != 1)} on average"
        return kind


@dataclass(frozen=True)
class Survey:
    """A table, or its beginning.

    Attributes:
        num_rows: that were read.
        is_whole: whether these are all.
        rows: some of them, spread evenly.
        folder: of the file, from where paths in it may lead; empty for a data set.
        is_complete: whether the rows have all values; images of a data set are left out.
    """

    columns: tuple[Column, ...]
    num_rows: int
    is_whole: bool
    rows: tuple[Mapping[str, Any], ...] = field(repr=False)
    folder: str = ""
    is_complete: bool = True

    def find(self, name: str | None) -> Column | None:
        """The column of that name."""
        return next((column for column in self.columns if column.name == name), None)

    def with_class_names(self, names: Mapping[str, Sequence[str]]) -> Survey:
        """The same, with what the numbers of some columns mean."""
        columns = (replace(each, class_names=tuple(names.get(each.name, ()))) for each in self.columns)
        return replace(self, columns=tuple(columns))

    def to_json(self) -> dict[str, Any]:
        """Plain values, from which `from_json` makes the same survey."""
        content = asdict(self)
        for column in content["columns"]:
            del column["values"]  # They stand in the rows.
        return content

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Survey:
        """What `to_json` gave, through JSON."""
        rows = tuple(content["rows"])
        columns = [
            Column(
                name=each["name"],
                kinds=tuple(each["kinds"]),
                num_filled=each["num_filled"],
                values=tuple(_clean(row.get(each["name"])) for row in rows),
                counts=None if each["counts"] is None else tuple((value, count) for value, count in each["counts"]),
                class_names=tuple(each["class_names"]),
            )
            for each in content["columns"]
        ]
        known = {key: content[key] for key in ("num_rows", "is_whole", "folder", "is_complete")}
        return cls(columns=tuple(columns), rows=rows, **known)


def survey_rows(rows: Iterable[Mapping[str, Any]], max_rows: int = MAX_ROWS_READ) -> Survey:
    """Look at rows, each with its values by column; at most `max_rows` of them."""
    kinds: dict[str, set[str]] = {}
    counts: dict[str, Counter[Any] | None] = {}
    filled: Counter[str] = Counter()
    kept: list[Mapping[str, Any]] = []
    num_rows, stride, is_whole = 0, 1, True
    for row in rows:
        if num_rows == max_rows:
            is_whole = False
            break
        if num_rows % stride == 0:
            kept.append(row)
            if len(kept) == 2 * _MAX_ROWS_KEPT:
                kept, stride = kept[::2], 2 * stride
        num_rows += 1
        for name, value in row.items():
            seen = kinds.setdefault(name, set())
            if _clean(value) is None:
                continue
            filled[name] += 1
            seen.add(_find_kind(value))
            counts[name] = _count(counts.setdefault(name, Counter()), value)
    columns = tuple(
        Column(
            name=name,
            kinds=tuple(sorted(kinds[name])),
            num_filled=filled[name],
            values=tuple(_clean(row.get(name)) for row in kept),
            counts=tuple(of_column.most_common()) if (of_column := counts.get(name)) else None,
        )
        for name in kinds
    )
    return Survey(columns, num_rows, is_whole, tuple(kept))


def _clean(value: Any) -> Any:
    """None for an empty cell of a CSV file as well."""
    return None if value == "" else value


def _find_kind(value: Any) -> str:
    if isinstance(value, dict) and value.keys() == {"bytes", "path"}:  # As `datasets` stores them.
        return IMAGE
    if isinstance(value, str) and value.lower().endswith(_IMAGE_SUFFIXES) and " " not in value:
        return IMAGE
    kind = _KINDS.get(type(value), type(value).__name__)
    if kind != LIST or not value:
        return kind
    inner = {_KINDS.get(type(item), type(item).__name__) for item in value if item is not None}
    return f"{LIST} of {inner.pop()}" if len(inner) == 1 else LIST


def _count(counts: Counter[Any] | None, value: Any) -> Counter[Any] | None:
    """The counts with one more value; None as soon as there are too many, or of another kind."""
    if counts is None:
        return None
    for item in value if isinstance(value, list) else [value]:
        if not isinstance(item, str | int | float) or (isinstance(item, str) and len(item) > _LONGEST_COUNTED):
            return None
        counts[item] += 1
    return counts if len(counts) <= _MAX_DISTINCT else None
