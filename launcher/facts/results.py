"""What a run found beside its metrics: classes, confusions, calibration, hardest examples, generations. Whatever its task.

Files may be missing, half written or of another version: what can't be read is left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onecurve.launcher.facts.history import History, read_json
from onecurve.training.run_directory import RunDirectory

_SHOWN_OF_SAMPLES = ("row", "prompt", "reference")
# What a report of entities has of all classes together: no class is called so.
_AVERAGES = ("micro avg", "macro avg", "weighted avg")
_LINE_BREAKS = re.compile(r"(?:[ \t\r]*\n){4,}[ \t\r]*")


@dataclass(frozen=True)
class ClassResult:
    """One class in the last evaluation."""

    name: str
    precision: float
    recall: float
    f1: float
    support: int


@dataclass(frozen=True)
class Confusion:
    """Examples by label (rows) and prediction (columns)."""

    labels: list[str]
    counts: list[list[int]]


@dataclass(frozen=True)
class Bin:
    """Decisions of about the same probability: the mean of it, and which share of them is true."""

    low: float
    high: float
    count: int
    probability: float
    share: float


@dataclass(frozen=True)
class Calibration:
    """What probabilities are of, the expected calibration error, and the bins that have decisions."""

    of: str
    error: float
    bins: list[Bin]


@dataclass(frozen=True)
class Sample:
    """What the model wrote behind one prompt.

    Attributes:
        before: at step 0; None if none was taken.
        after: at the last step.
    """

    row: str
    prompt: str
    before: str | None
    after: str
    reference: str


@dataclass(frozen=True)
class Results:
    """All of it. Each part is empty or None where the task has none."""

    classes: list[ClassResult]
    confusion: Confusion | None
    calibration: Calibration | None
    hardest: list[dict[str, str]]
    samples: list[Sample]
    samples_step: int


@dataclass(frozen=True)
class StartFact:
    """One start of the training: its number, the step after which it began, and its environment.json."""

    number: int
    step: int | None
    environment: dict[str, Any]


def load_results(run: Path) -> Results:
    """Read eval_report.json and samples.jsonl of a run directory."""
    directory = RunDirectory(run)
    report = read_json(directory.eval_report)
    step, samples = _read_samples(directory.samples)
    return Results(
        _read_classes(report.get("per_class")),
        _read_confusion(report),
        _read_calibration(report.get("calibration")),
        _read_hardest(report.get("hardest")),
        samples,
        step,
    )


def load_starts(history: History) -> list[StartFact]:
    """Every start of which the run directory has an environment, the first one first."""
    directory = RunDirectory(history.path)
    last = history.environment.get("num_starts")
    last = last if isinstance(last, int) else 1
    past = [(number, read_json(directory.past_environment(number))) for number in range(1, last)]
    found = [(number, content) for number, content in (*past, (last, history.environment)) if content]
    return [
        StartFact(number, step if isinstance(step := content.get("start_step"), int) else None, content)
        for number, content in found
    ]


def _read_classes(content: Any) -> list[ClassResult]:
    try:
        return [
            ClassResult(
                str(name),
                float(row["precision"]),
                float(row["recall"]),
                float(row["f1-score"]),
                int(row["support"]),
            )
            for name, row in content.items()
            if name not in _AVERAGES
        ]
    except (KeyError, TypeError, ValueError, AttributeError):
        return []


def _read_confusion(report: Mapping[str, Any]) -> Confusion | None:
    try:
        labels = [str(name) for name in report["labels"]]
        counts = [[int(count) for count in row] for row in report["confusion_matrix"]]
    except (KeyError, TypeError, ValueError):
        return None  # Several labels for an example have a matrix each.
    is_square = len(counts) == len(labels) and all(len(row) == len(labels) for row in counts)
    return Confusion(labels, counts) if is_square and labels else None


def _read_calibration(content: Any) -> Calibration | None:
    names = ("low", "high", "count", "probability", "share")
    try:
        bins = [Bin(*(float(each[name]) for name in names)) for each in content["bins"]]  # type: ignore[arg-type]
        return Calibration(str(content["of"]), float(content["error"]), bins)
    except (KeyError, TypeError, ValueError):
        return None


def _read_hardest(content: Any) -> list[dict[str, str]]:
    if not isinstance(content, list) or not all(isinstance(each, dict) for each in content):
        return []
    return [
        {
            str(name): f"{value:.3f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
            for name, value in each.items()
        }
        for each in content
    ]  # fmt: skip


def _read_samples(path: Path) -> tuple[int, list[Sample]]:
    """The last step that has samples, and its generations beside those of step 0."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        last = max((int(line["step"]) for line in lines), default=0)
        before = {line["row"]: str(line["generated"]) for line in lines if line["step"] == 0} if last else {}
        return last, [_build_sample(line, before) for line in lines if line["step"] == last]
    except (OSError, ValueError, KeyError, TypeError):
        return 0, []  # The task makes none, or another one's have other columns.


def _build_sample(line: Mapping[str, Any], before: Mapping[Any, str]) -> Sample:
    row, prompt, reference = (str(line[name]) for name in _SHOWN_OF_SAMPLES)
    first = before.get(line["row"])
    return Sample(
        row, prompt, None if first is None else shorten_blanks(first), shorten_blanks(str(line["generated"])), reference
    )


def shorten_blanks(text: str) -> str:
    """A generation with its long runs of line breaks counted: an untrained model writes pages of them."""
    if not text.strip():
        return f"(nothing but {len(text):,} blank characters)" if text else "(nothing)"
    return _LINE_BREAKS.sub(lambda found: f"\n(... {found.group().count(chr(10)):,} line breaks)\n", text)


def list_confusions(confusion: Confusion, most: int) -> list[tuple[str, str, int, float]]:
    """Label, prediction, examples, and their share of the label's examples, of the most frequent mistakes."""
    totals = [sum(row) for row in confusion.counts]
    found = [
        (label, confusion.labels[column], count, count / totals[number])
        for number, label in enumerate(confusion.labels)
        for column, count in enumerate(confusion.counts[number])
        if column != number and count
    ]
    return sorted(found, key=lambda each: -each[2])[:most]


def normalize(counts: Sequence[Sequence[int]]) -> list[list[float]]:
    """Each row as shares of its sum; zeros where a label has no example."""
    return [[count / (sum(row) or 1) for count in row] for row in counts]
