"""Data files: there, readable, with the recipe's columns, and nothing wrong in the first rows.

Files are found and read by training's own code, so what is said here is what training would say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from onecurve.launcher.facts.recipes import find_columns, find_row_problem
from onecurve.launcher.preflight.findings import Finding, error
from onecurve.training.errors import BadInput

if TYPE_CHECKING:
    from onecurve.training.recipe import Recipe

_NUM_ROWS_READ = 200


def check_data(recipe: Recipe) -> list[Finding]:
    """What is wrong with the recipe's files, judged by the head of each."""
    from onecurve.training.data.sources import find_files

    messages: list[str] = []
    for key in ("train_file", "validation_file", "test_file"):
        patterns = getattr(recipe, key) or ()
        paths: list[Path] = []
        problems: list[str] = []
        for pattern in patterns:
            try:
                paths += find_files(key, [pattern])
            except BadInput as bad:
                problems.append(str(bad))
        if patterns and not problems:
            try:
                find_files(key, patterns)
            except BadInput as bad:
                problems.append(str(bad))
        messages += problems
        for path in paths:
            messages += _check_data_file(path, recipe)
    return [error(message) for message in messages]


def _check_data_file(path: Path, recipe: Recipe) -> list[str]:
    from onecurve.training.data.sources import describe_missing_column, suggest_separator
    from onecurve.training.data.tables import read_head

    try:
        head = read_head(path, _NUM_ROWS_READ)
    except BadInput as bad:
        return [str(bad)]
    if not head.rows:
        return [f"{path}: has no rows"]
    missing = {
        name: describe_missing_column(str(path), key, name, head.columns)
        for key, names in find_columns(recipe).items()
        for name in names
        if name not in head.columns
    }
    if suggest_separator(head.columns):
        return list(missing.values())[:1]
    problems = list(missing.values())
    if not missing.keys() & set(chain.from_iterable(find_columns(recipe, with_targets=False).values())):
        has_targets = not missing
        problems += _describe_rows(path, [find_row_problem(recipe, row, has_targets) for row in head.rows])
    return problems


def _describe_rows(path: Path, problems: Sequence[str | None]) -> list[str]:
    """Each kind of problem once, with the first row that has it."""
    found: Mapping[str, list[int]] = {problem: [] for problem in problems if problem is not None}
    for number, problem in enumerate(problems, start=1):
        if problem is not None:
            found[problem].append(number)
    messages = []
    for problem, numbers in found.items():
        more = f" (and {len(numbers) - 1} more such of the first {len(problems)})" if len(numbers) > 1 else ""
        messages.append(f"{path}, row {numbers[0]}: {problem}{more}")
    return messages
