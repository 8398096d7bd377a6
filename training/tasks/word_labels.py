"""Rows whose columns are lists: the words of a text, and a label for each of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from onecurve.training.errors import BadInput
from onecurve.training.recipe import find_nearest
from onecurve.training.tasks.base import Rows
from onecurve.training.tasks.labels import shorten_names, to_name


def find_word_problem(name: str, words: Any, labels: tuple[str, Any] | None) -> str | None:
    """What is wrong with the words of a row, or with their labels; None where nothing is.

    Args:
        name: of the column of words.
        labels: name and value of the column of labels; None in a file to predict.
    """
    if not isinstance(words, list):
        return _describe_no_list(name, words, "words")
    if not words:
        return f"column {name!r} has no word; fill or remove the row"
    for number, word in enumerate(words, start=1):
        if not isinstance(word, str) or not word.strip():
            return f"word {number} of column {name!r} is {word!a:.40}; a word is a text that is not empty"
    return None if labels is None else _find_label_problem(*labels, len(words))


def _find_label_problem(name: str, labels: Any, num_words: int) -> str | None:
    if not isinstance(labels, list):
        return _describe_no_list(name, labels, "labels")
    if len(labels) != num_words:
        return f"column {name!r} has {len(labels)} labels for {num_words} words; each word needs one"
    for number, label in enumerate(labels, start=1):
        if label is None or label == "":
            return f"label {number} of column {name!r} is empty; each word needs one"
        if not isinstance(label, str | int):
            kind = "the decimal number" if isinstance(label, float) else f"the {type(label).__name__}"
            return f"label {number} of column {name!r} is {kind} {label!r:.40}; labels are texts or whole numbers"
        if isinstance(label, int) and label < 0:
            advice = "where others leave a word out by -100, give it a label of its own, such as O"
            return f"label {number} of column {name!r} is {label}; labels are counted from 0: {advice}"
    return None


def _describe_no_list(name: str, value: Any, meant: str) -> str:
    found = "empty" if value is None or value == "" else f"{type(value).__name__} {value!r:.40}"
    advice = "JSON Lines, Parquet and .conll files have lists, CSV has none"
    return f"column {name!r} must hold a list of {meant} in each row, it is {found}; {advice}"


class WordLabels:
    """The labels of rows that `find_word_problem` finds right.

    Attributes:
        are_numbers: whether they are whole numbers, and nothing says what these mean.
    """

    def __init__(self, rows: Rows, column: str, label_names: Sequence[str]) -> None:
        """Read no row yet.

        Args:
            label_names: the recipe's; else the data's schema may have some.
        """
        self._rows, self._column = rows, column
        self._meanings = list(label_names) or list(rows.class_names.get(column, ()))
        self.are_numbers = False

    def find_names(self) -> list[str]:
        """The names of all labels: as recipe or schema have them, else sorted, numbers by their value.

        Raises:
            BadInput: there are fewer than two.
        """
        found: set[Any] = set()
        for _, row in self._rows.iterate():
            found.update(row[self._column])
        self.are_numbers = not self._meanings and all(isinstance(label, int) for label in found)
        if len(found) < 2:
            shown = [to_name(label) for label in found]
            raise BadInput(f"{self._rows.origin}: column {self._column!r} holds only the label {shown}; two are needed")
        return self._meanings or [to_name(label) for label in sorted(found)]

    def iterate_names(self) -> Iterator[list[str]]:
        """The names of each row's labels.

        Raises:
            BadInput: naming the first row with a number that has no name.
        """
        for position, row in self._rows.iterate():
            yield [self._name(position, label) for label in row[self._column]]

    def iterate_numbers(self, names: Sequence[str]) -> Iterator[list[int]]:
        """The number of each label of each row among `names`.

        Raises:
            BadInput: naming the first row with a label that is none of them.
        """
        known = {name: number for number, name in enumerate(names)}
        for position, row in self._rows.iterate():
            labels = [self._name(position, label) for label in row[self._column]]
            try:
                yield [known[label] for label in labels]
            except KeyError as error:
                unknown = error.args[0]
                nearest = find_nearest(unknown, names)
                hint = f", if not {nearest!r} is meant" if nearest else ""
                self._rows.refuse(
                    position,
                    f"label {labels.index(unknown) + 1} of column {self._column!r} is {unknown!r}, none of the {len(names)} "
                    f"labels of the training data, {shorten_names(names)}; label_names can name it too{hint}",
                )

    def _name(self, position: int, label: Any) -> str:
        if not self._meanings or isinstance(label, str):
            return to_name(label)
        if not 0 <= label < len(self._meanings):
            self._rows.refuse(
                position,
                f"label {label} of column {self._column!r} has no name: there are {len(self._meanings)}, from 0 on, "
                f"{shorten_names(self._meanings)}",
            )
        return str(self._meanings[label])
