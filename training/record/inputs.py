"""What a start was given to learn from, as digests for environment.json: `onecurve compare --assert` tells runs apart by them."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from onecurve.training.data.identity import digest_contents
from onecurve.training.data.preparation import PreparedData, Split
from onecurve.training.models.fingerprint import fingerprint_model
from onecurve.training.recipe import Recipe
from onecurve.training.tasks import Task


def describe_inputs(recipe: Recipe, task: Task, data: PreparedData) -> dict[str, Any]:
    """Data, model and tokenizer. Digests are of contents: files that were only moved or renamed have the same.

    Returns:
        "sources": for each split with files of its own (or "folder", "hub", and "files" that rows name) a digest of their
        bytes; "data": for each split how many examples it has, a digest of them in order and one in any order; "model" as
        `fingerprint_model` returns it; "processor": of the tokenizer or image processor; "task": of its file, empty for one of
        the project.
    """
    splits = {"train": data.train, "validation": data.validation, "test": data.test}
    return {
        "sources": {name: _digest_source(entries) for name, entries in data.sources.items()},
        "data": {name: _describe_split(split) for name, split in splits.items() if split is not None},
        "model": fingerprint_model(recipe),
        "processor": data.processor[:16],
        "task": task.fingerprint()[:16],
    }


def _digest_source(entries: list[Any]) -> str:
    """Entries are (path, digest) of files, or the hub's own digests; the path says nothing about the content."""
    contents = [entry[1] if isinstance(entry, list) else entry for entry in entries]
    return hashlib.sha256(json.dumps(contents).encode()).hexdigest()[:16]


def _describe_split(split: Split) -> dict[str, Any]:
    found: dict[str, Any] = {"examples": len(split), "digest": split.digest}
    if split.identities is not None:
        found["contents"] = digest_contents(split.identities)
    return found
