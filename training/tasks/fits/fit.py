"""One way in which a task could read a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# How much speaks for a fit. One that is only possible is taken where a flag asks for it, never by itself.
SURE, NAMED, LIKELY, POSSIBLE = 4, 3, 2, 1
CERTAINTIES = {
    SURE: "the columns mean nothing else",
    NAMED: "names and kinds of the columns agree",
    LIKELY: "the kinds of the columns agree",
    POSSIBLE: "only if you mean it",
}


@dataclass(frozen=True)
class Models:
    """Names on the hub of models to begin with: one that a CPU trains in reasonable time, and one for a GPU."""

    for_cpu: str
    for_gpu: str


ENGLISH_ENCODERS = Models("distilbert/distilbert-base-cased", "FacebookAI/roberta-base")
MULTILINGUAL_ENCODERS = Models("distilbert/distilbert-base-multilingual-cased", "FacebookAI/xlm-roberta-base")


@dataclass(frozen=True)
class Fit:
    """One way in which a task could read a table.

    Attributes:
        keys: recipe keys that say which columns are read, and what else the columns say.
        certainty: one of `CERTAINTIES`.
        reason: why, in one line.
        models: to begin with, where the user names none.
        training: recipe keys of the training that suit this task: learning rate, metric.
        comments: what to say beside some of these keys.
        optional: keys to write as comments, each with its value.
        lengths: texts of the kept rows, by the recipe key that bounds how many of their tokens are read.
        longest: by such a key the most that is sensible, because what is longer is cut into windows.
        shares: keys whose value is a share of such a key's, with its name and the share.
        remarks: what the user should know, such as columns that are not read, and classes with few rows.
        facts: numbers that were found, by name: rows of each label.
    """

    keys: Mapping[str, Any]
    certainty: int
    reason: str
    models: Models
    training: Mapping[str, Any] = field(default_factory=dict)
    comments: Mapping[str, str] = field(default_factory=dict)
    optional: Mapping[str, Any] = field(default_factory=dict)
    lengths: Mapping[str, Sequence[str]] = field(default_factory=dict)
    longest: Mapping[str, int] = field(default_factory=dict)
    shares: Mapping[str, tuple[str, float]] = field(default_factory=dict)
    remarks: Sequence[str] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
