"""Data files: there, readable, with the recipe's columns, and texts and labels in the first rows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from onecurve.launcher.facts.data_files import FORMATS, UnreadableData, expand, read_head
from onecurve.launcher.preflight.findings import Finding, error

if TYPE_CHECKING:
    from onecurve.training.config import Recipe

_NUM_ROWS_READ = 200


def check_data(recipe: Recipe) -> list[Finding]:
    """What is wrong with the recipe's files, judged by the head of each."""
    findings: list[Finding] = []
    for key in ("train_file", "validation_file", "test_file"):
        for pattern in getattr(recipe, key) or ():
            paths = expand(pattern)
            if not paths:
                findings.append(error(f"{key}: no file matches {pattern!r}"))
            for path in paths:
                findings += [error(message) for message in _check_data_file(key, path, recipe)]
    return findings


def _check_data_file(key: str, path: Path, recipe: Recipe) -> list[str]:
    from onecurve.training.config import find_nearest

    if not path.exists():
        folder = path.parent if path.parent.is_dir() else Path()
        nearest = find_nearest(path.name, [other.name for other in folder.iterdir() if other.is_file()])
        return [f"{key}: {str(path)!r} does not exist" + (f"; did you mean {nearest!r}?" if nearest else "")]
    if path.is_dir():
        return [f"{key}: {str(path)!r} is a folder; for a save_to_disk folder use dataset_name"]
    if path.suffix.lower() not in FORMATS:
        return [f"{key}: {str(path)!r} is none of {', '.join(FORMATS)}; rename or convert it"]
    if path.stat().st_size == 0:
        return [f"{key}: {str(path)!r} is empty"]
    try:
        head = read_head(path, _NUM_ROWS_READ)
    except UnreadableData as unreadable:
        return [f"{key}: {unreadable}"]
    if not head.rows:
        return [f"{key}: {str(path)!r} has no rows"]
    labels = [recipe.label_column] if isinstance(recipe.label_column, str) else list(recipe.label_column)
    texts = [recipe.text_column] + ([recipe.text_pair_column] if recipe.text_pair_column else [])
    problems = []
    for setting, names in (("text_column", texts), ("label_column", labels)):
        for name in names:
            if name not in head.columns:
                nearest = find_nearest(name, head.columns)
                problems.append(
                    f"{path}: {setting} {name!r} is not a column; it has {', '.join(head.columns)}"
                    + (f"; did you mean {nearest}?" if nearest else "")
                )
    found: dict[str, list[int]] = {}
    for number, row in enumerate(head.rows, start=1):
        for name in texts:
            text = row.get(name)
            if name in head.columns and (not isinstance(text, str) or not text.strip()):
                what = "is empty" if text is None or isinstance(text, str) else f"holds {type(text).__name__}, not text"
                found.setdefault(f"text column {name!r} {what}; fill or remove the row", []).append(number)
        for name in labels:
            problem = _check_label(row.get(name), recipe.problem_type) if name in head.columns else None
            if problem is not None:
                found.setdefault(f"label column {name!r} {problem}", []).append(number)
    for problem, numbers in found.items():
        more = f" (and {len(numbers) - 1} more such of the first {len(head.rows)})" if len(numbers) > 1 else ""
        problems.append(f"{path}, row {numbers[0]}: {problem}{more}")
    return problems


def _check_label(label: object, problem_type: str) -> str | None:
    if label is None or label == "":
        return "is empty; fill or remove the row"
    if problem_type == "regression":
        try:
            float(str(label))
        except ValueError:
            return f"holds {label!r}, which is no number"
    if problem_type == "single_label_classification" and isinstance(label, (float, list, dict)):
        return f"holds {type(label).__name__} {label!r}; classes are integers or strings (see problem_type)"
    return None
