"""Rows of a file or split, as a task reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

from onecurve.training.errors import BadInput

if TYPE_CHECKING:
    import pyarrow
    from numpy.typing import NDArray

_ROWS_AT_ONCE = 2_000


@dataclass(frozen=True)
class Rows:
    """Rows of a file or split, as a task reads them.

    Attributes:
        table: the columns that the task reads.
        numbers: [rows] place of each row in its file, from 0.
        origin: the file or split, for messages.
        class_names: of each column whose schema names its classes (datasets.ClassLabel): their names, in order.
    """

    table: pyarrow.Table
    numbers: NDArray[Any]
    origin: str
    class_names: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.numbers)

    def values(self, column: str) -> list[Any]:
        """A column as Python values."""
        values: list[Any] = self.table.column(column).to_pylist()
        return values

    def iterate(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Each row's position and its values by column, without all of them in memory."""
        batches = self.table.to_batches(max_chunksize=_ROWS_AT_ONCE)
        return enumerate(row for batch in batches for row in batch.to_pylist())

    def refuse_first(self, find_problem: Callable[[Mapping[str, Any]], str | None]) -> None:
        """Refuse the first row that has a problem, if any has one.

        Raises:
            BadInput: naming the row.
        """
        for position, row in self.iterate():
            if (problem := find_problem(row)) is not None:
                self.refuse(position, problem)

    def refuse(self, position: int, problem: str) -> NoReturn:
        """Refuse a row by its number in its file, counted from 1.

        Args:
            position: of the row among these rows, from 0.

        Raises:
            BadInput: always.
        """
        raise BadInput(f"{self.origin}, row {self.numbers[position] + 1}: {problem}")
