"""From rows to examples on disk, once: tokenized by one process and kept in a cache.

This happens before any process group exists, because a group would time out waiting. A folder of the cache is named by the
content of everything that shaped it, and is complete or not there::

    $ONECURVE_CACHE/prepared/<key>/
        meta.json                       the task's facts; the origin and the digest of each split
        train/, validation/, test/      features (columns.py); counts.npy, lengths.npy and identities.npy [examples]
"""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from filelock import FileLock

from onecurve.training.cache import find_cache
from onecurve.training.data.columns import Array, Examples, ExamplesWriter, Feature, open_examples, release
from onecurve.training.data.identity import identify_examples
from onecurve.training.data.shared_answer import share_answer
from onecurve.training.data.splits import NAMES, RawSplit, Sources, check_columns
from onecurve.training.errors import BadInput
from onecurve.training.process import check_launcher
from onecurve.training.recipe import DataKeys, Recipe
from onecurve.training.tasks.base import Task
from onecurve.training.work_progress import WorkProgress

# Raised whenever the layout or the meaning of a prepared folder changes.
PREPARED_FORMAT = 6

# Digests of another kind say nothing about these: a run that was begun with them is not compared. The number is that of
# the format whose digests were last computed in another way.
DIGEST_PREFIX = "4:"

# Above so many training examples a comparison with the validation data would take seconds and gigabytes.
_MOST_COMPARED = 2_000_000
_SHARE_NOTED = 0.01
_NUMBERS_PER_DIGEST = 1 << 22
_EXAMPLES_COMPARED_AT_ONCE = 256


@dataclass(frozen=True)
class Split:
    """The examples of a split, memory-mapped.

    Attributes:
        examples: their features.
        lengths: [examples] tokens of each: what it costs.
        counts: [examples] what each adds to the number that its step's loss is divided by.
        origin: the files or the hub split that it came from.
        digest: of what is learned from it: features and counts, in order; the same wherever the files lie.
        identities: [examples] a digest of the content of each (identity.py); None where nobody compares them.
    """

    examples: Examples
    lengths: Array
    counts: Array
    origin: str
    digest: str
    identities: Array | None = None

    def __len__(self) -> int:
        return len(self.lengths)


@dataclass(frozen=True)
class PreparedData:
    """The splits that the recipe asks for.

    Attributes:
        notes: lines for the user about the data.
        sources: digests of what they were prepared from, as `Sources.fingerprint` names them; "files" are those that rows name.
        processor: a digest of the tokenizer or image processor.
    """

    train: Split
    validation: Split
    test: Split | None
    notes: tuple[str, ...] = ()
    sources: Mapping[str, Any] = field(default_factory=dict)
    processor: str = ""


def prepare_data(recipe: Recipe, task: Task, processor: Any) -> PreparedData:
    """Encode the recipe's data, or find it in the cache; afterwards `task` has its facts.

    Whichever process comes first does the work under a file lock; the others then find it done.

    Raises:
        BadInput: naming file, row and column of the first fault.
    """
    datasets.disable_progress_bars()
    sources = Sources(recipe)
    cache = find_cache() / "prepared"
    # All data is read for it: by one process of each machine, whose cores and network they share.
    fingerprint = json.loads(
        share_answer(recipe.model_dump_json(), lambda: json.dumps(_fingerprint_data(task, sources)))
    )
    digest = hashlib.sha256(task.processor_kind.fingerprint(processor)).hexdigest()
    folder = cache / _build_key(recipe, task, digest, fingerprint)
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not folder.is_dir():
                _publish(folder, recipe, task, processor, sources)
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    task.facts = meta["facts"]
    splits = {name: _open_split(folder / name, entry) for name, entry in meta["splits"].items()}
    named = {"files": [fingerprint["files"]]} if "files" in fingerprint else {}
    seen = fingerprint["sources"] | named
    return PreparedData(splits["train"], splits["validation"], splits.get("test"), tuple(meta["notes"]), seen, digest)


def _open_split(folder: Path, entry: Mapping[str, str]) -> Split:
    return Split(
        examples=open_examples(folder),
        lengths=np.load(folder / "lengths.npy", mmap_mode="r"),
        counts=np.load(folder / "counts.npy", mmap_mode="r"),
        origin=entry["origin"],
        digest=entry["digest"],
        identities=np.load(folder / "identities.npy", mmap_mode="r"),
    )


def _build_key(recipe: Recipe, task: Task, processor: str, fingerprint: Mapping[str, Any]) -> str:
    """A hash of the data's bytes, the processor and every key that may shape what is stored.

    These are the keys of data, the seed and all keys of the task's own: one that is forgotten would reuse stale data.

    Args:
        processor: its digest.
        fingerprint: digests of the data.
    """
    own = type(recipe).model_fields.keys() - Recipe.model_fields.keys()
    shaping = recipe.model_dump(mode="json", include={"task", "seed", *DataKeys.model_fields, *own})
    shaping |= {"format": PREPARED_FORMAT, "datasets": datasets.__version__, "model": task.model_facts}
    shaping |= fingerprint
    shaping |= {"code": task.fingerprint(), "processor": processor}
    return hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest()[:32]


def _fingerprint_data(task: Task, sources: Sources) -> dict[str, Any]:
    found: dict[str, Any] = {"sources": sources.fingerprint()}
    if named := task.named_files():
        found["files"] = sources.fingerprint_named(named)
    return found


def _publish(folder: Path, recipe: Recipe, task: Task, processor: Any, sources: Sources) -> None:
    """Build under another name, and give the folder its own by a rename."""
    check_launcher()  # It may have exited while this process waited for the lock.
    staging = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    staging.mkdir()  # Unlike mkdtemp it follows the umask: others may share the cache.
    try:
        scratch = staging / "scratch"
        _build(staging, scratch, recipe, task, processor, sources)
        shutil.rmtree(scratch, ignore_errors=True)
        staging.rename(folder)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _build(staging: Path, scratch: Path, recipe: Recipe, task: Task, processor: Any, sources: Sources) -> None:
    """Read all splits, check them, choose their rows, encode them."""
    raw = {name: split for name in NAMES if (split := sources.read(name, scratch)) is not None}
    columns = task.columns(recipe)
    for split in raw.values():
        check_columns(split, columns)
    wanted = list(dict.fromkeys(name for names in columns.values() for name in names))
    task.facts = task.learn(raw["train"].rows(wanted))
    for split in raw.values():
        check_launcher()
        task.check(split.rows(wanted))
    meta: dict[str, Any] = {}
    for name, (split, numbers, origin) in _choose_rows(raw, wanted, recipe, task).items():
        _encode(staging / name, split, wanted, numbers, task, processor)
        meta[name] = {"origin": origin}
    task.conclude(open_examples(staging / "train"))
    for name in meta.keys() - {"train"}:
        if recipe.model_dump()[f"{name}_file"] or recipe.dataset_name:
            _note_overlap(staging, name, meta, task)
    for name, entry in meta.items():
        entry["digest"] = _conclude(staging / name, task)
    (staging / "meta.json").write_text(
        json.dumps({"facts": task.facts, "splits": meta, "notes": list(task.notes.values())}), encoding="utf-8"
    )


def _note_overlap(staging: Path, name: str, meta: Mapping[str, Mapping[str, str]], task: Task) -> None:
    """Note examples of a split that are training examples too: its metrics say little about new ones."""
    train, held_out = (open_examples(staging / each).get(task.input_feature) for each in ("train", name))
    if train is None or held_out is None or len(train) > _MOST_COMPARED:
        return
    known = set(_hash_each(train))
    count = sum(each in known for each in _hash_each(held_out))
    if count >= _SHARE_NOTED * len(held_out):
        task.notes[f"overlap of {name}"] = (
            f"{meta[name]['origin']}: {count} of {len(held_out)} {name} examples are training examples too; their metrics say "
            "little about new ones"
        )


def _hash_each(feature: Feature) -> Iterator[int]:
    """A hash of what each example holds, a few of them in memory at a time."""
    for start in range(0, len(feature), _EXAMPLES_COMPARED_AT_ONCE):
        for values in feature[np.arange(start, min(start + _EXAMPLES_COMPARED_AT_ONCE, len(feature)))]:
            yield hash(values.tobytes())


def _choose_rows(
    raw: Mapping[str, RawSplit], columns: list[str], recipe: Recipe, task: Task
) -> dict[str, tuple[RawSplit, Array, str]]:
    """For each split where its rows come from, their numbers there, and its name for people."""
    chosen = {name: (split, np.arange(len(split)), split.origin) for name, split in raw.items()}
    if "validation" not in chosen:
        train = raw["train"]
        strata = task.strata(train.rows(columns))
        kept, held_out = hold_out(len(train), strata, recipe.validation_fraction, recipe.seed)
        if not len(kept) or not len(held_out):
            raise BadInput(
                f"{train.origin}: {len(train)} rows are too few to hold out {recipe.validation_fraction:g} of them"
            )
        chosen["train"] = (train, kept, train.origin)
        chosen["validation"] = (train, held_out, f"rows held out of {train.origin}")
    for name, key in (("train", "max_train_samples"), ("validation", "max_eval_samples")):
        split, numbers, origin = chosen[name]
        chosen[name] = (split, _subset(numbers, getattr(recipe, key), recipe.seed, key, origin), origin)
    return chosen


def hold_out(num_rows: int, strata: Array | None, fraction: float, seed: int) -> tuple[Array, Array]:
    """Split rows at random, keeping each stratum's share.

    Each stratum gives the rounded fraction of its rows, at least one where it has two or more.

    Returns:
        Rows that stay and rows held out, both ascending.
    """
    generator = np.random.default_rng(seed)
    groups = (
        [np.arange(num_rows)] if strata is None else [np.flatnonzero(strata == value) for value in np.unique(strata)]
    )
    held_out = []
    for rows in groups:
        count = min(max(round(len(rows) * fraction), 1), len(rows) - 1)
        held_out.append(generator.permutation(rows)[:count])
    chosen = np.sort(np.concatenate(held_out))
    return np.setdiff1d(np.arange(num_rows), chosen), chosen


def _subset(rows: Array, limit: int | None, seed: int, key: str, origin: str) -> Array:
    """The first `limit` rows of a seeded shuffle: the tutorial's `.shuffle(seed=42).select(range(1000))`."""
    if limit is None:
        return rows
    if limit > len(rows):
        raise BadInput(f"{key}: {limit} is more than the {len(rows)} rows of {origin}")
    return rows[np.random.default_rng(seed).permutation(len(rows))[:limit]]


def _encode(folder: Path, split: RawSplit, columns: list[str], numbers: Array, task: Task, processor: Any) -> None:
    """Write the features of some rows, a batch at a time."""
    with ExamplesWriter(folder) as writer, WorkProgress(f"preparing {folder.name}", len(numbers), "rows") as progress:
        for start in range(0, len(numbers), task.rows_at_once):
            check_launcher()
            rows = split.rows(columns, numbers[start : start + task.rows_at_once])
            batch = task.encode(rows, processor)
            if "row" in batch:  # Positions among these rows; kept as numbers in the file.
                batch["row"] = rows.numbers[np.asarray(batch["row"])]
            writer.write(batch)
            progress.advance(len(rows))
    if not writer.num_examples:
        reasons = task.describe_left_out()
        raise BadInput(f"{split.origin}: no row gives an example to learn from" + (f". {reasons}" if reasons else ""))


def _conclude(folder: Path, task: Task) -> str:
    """Write lengths and counts of a split's examples; returns the digest of the split."""
    examples = open_examples(folder)
    lengths = np.asarray(task.lengths(examples), dtype=np.int32)
    counts = np.asarray(task.counts(examples), dtype=np.float64)
    np.save(folder / "lengths.npy", lengths)
    np.save(folder / "counts.npy", counts)
    np.save(folder / "identities.npy", identify_examples(examples, len(lengths)))
    digest = hashlib.sha256(json.dumps(task.facts, sort_keys=True).encode())
    for name, feature in sorted(examples.items()):
        digest.update(name.encode())
        for array in feature.arrays:
            _update(digest, array)
    _update(digest, counts)
    return DIGEST_PREFIX + digest.hexdigest()


def _update(digest: Any, array: Array) -> None:
    flat = array.reshape(-1)
    for start in range(0, len(flat), _NUMBERS_PER_DIGEST):
        digest.update(np.ascontiguousarray(flat[start : start + _NUMBERS_PER_DIGEST]).data)
        release(array)
