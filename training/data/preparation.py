"""From files, folders or the hub to tokens on disk, and from there to the batches of one process.

Data is tokenized once, by one process, before any process group exists (a group would time out waiting), and kept in a
cache named by the content of everything that shaped it. A cache folder is complete or it is not there. Training reads it
memory-mapped: nobody holds a data set in memory.

    $ONECURVE_CACHE/prepared/<key>/
        meta.json                      label names, rows, where each split came from
        train/, validation/, test/     datasets.save_to_disk folders: input_ids, ...
        train.lengths.npy, train.labels.npy, ...
"""

from __future__ import annotations

import csv
import glob
import hashlib
import json
import shutil
import signal
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from filelock import FileLock
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from onecurve.training.cache import find_cache
from onecurve.training.config import Recipe, find_nearest
from onecurve.training.data.plan import EvaluationPlan, MicroBatch, TrainingPlan
from onecurve.training.errors import BadInput
from onecurve.training.process import STOP_SIGNALS, check_launcher
from onecurve.training.tasks import TextClassification

# Raised whenever the layout or the meaning of a prepared folder changes.
PREPARED_FORMAT = 2

_FORMATS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
_ROWS_PER_TOKENIZER_CALL = 2_000
_BYTES_PER_READ = 1 << 20

Array = NDArray[Any]


@dataclass(frozen=True)
class Split:
    """A tokenized split, memory-mapped.

    Attributes:
        tokens: rows of input_ids and what else the tokenizer returned; unpadded.
        lengths: [rows] tokens of each row.
        labels: [rows] or [rows, num_labels], as the task encoded them.
        origin: the files or the hub split that it came from.
        digest: of what is learned from it: the tokens and labels of each row, in order; the same wherever the files lie.
    """

    tokens: datasets.Dataset
    lengths: Array
    labels: Array
    origin: str
    digest: str

    def __len__(self) -> int:
        return len(self.lengths)


@dataclass(frozen=True)
class PreparedData:
    """The splits that the recipe asks for."""

    train: Split
    validation: Split
    test: Split | None
    label_names: list[str]


def prepare_data(recipe: Recipe, task: TextClassification, tokenizer: Any) -> PreparedData:
    """Tokenize the recipe's data, or find it in the cache; afterwards `task` knows its labels.

    Whichever process comes first does the work under a file lock; the others then find it done.

    Raises:
        BadInput: naming file, row and column of the first fault.
    """
    datasets.disable_progress_bars()
    sources = _find_sources(recipe)
    key = _cache_key(recipe, tokenizer, sources)
    cache = find_cache() / "prepared"
    folder = cache / key
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{key}.lock"):
            if not folder.is_dir():
                _build(folder, recipe, task, tokenizer, sources)
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    task.label_names = meta["label_names"]
    splits = {
        name: _open_split(folder, name, origin, meta["digests"][name]) for name, origin in meta["origins"].items()
    }
    task.set_class_weights(splits["train"].labels)
    return PreparedData(splits["train"], splits["validation"], splits.get("test"), meta["label_names"])


def _open_split(folder: Path, name: str, origin: str, digest: str) -> Split:
    return Split(
        tokens=datasets.load_from_disk(str(folder / name)).with_format("numpy"),
        lengths=np.load(folder / f"{name}.lengths.npy", mmap_mode="r"),
        labels=np.load(folder / f"{name}.labels.npy", mmap_mode="r"),
        origin=origin,
        digest=digest,
    )


# Finding -------------------------------------------------------------------------------------------------------------


def _find_sources(recipe: Recipe) -> dict[str, list[Path]]:
    """Local files of each split, globs expanded; a save_to_disk folder is the one entry "dataset"; empty for the hub."""
    sources = {}
    for split, patterns in (
        ("train", recipe.train_file),
        ("validation", recipe.validation_file),
        ("test", recipe.test_file),
    ):
        if patterns is not None:
            sources[split] = [path for pattern in patterns for path in _expand(f"{split}_file", pattern)]
    if recipe.dataset_name is not None and Path(recipe.dataset_name).is_dir():
        folder = Path(recipe.dataset_name)
        if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
            sources["dataset"] = sorted(path for path in folder.rglob("*") if path.is_file())
    return sources


def _expand(key: str, pattern: str) -> list[Path]:
    paths = (
        [Path(path) for path in sorted(glob.glob(pattern, recursive=True))]
        if glob.has_magic(pattern)
        else [Path(pattern)]
    )
    if not paths:
        raise BadInput(f"{key}: no file matches {pattern!r}")
    for path in paths:
        if not path.exists():
            folder = path.parent if path.parent.is_dir() else Path()
            nearest = find_nearest(path.name, [other.name for other in folder.iterdir() if other.is_file()])
            raise BadInput(f"{key}: {str(path)!r} does not exist" + (f"; did you mean {nearest!r}?" if nearest else ""))
        if path.is_dir():
            raise BadInput(f"{key}: {str(path)!r} is a folder; for a save_to_disk folder use dataset_name")
        if path.suffix.lower() not in _FORMATS:
            raise BadInput(f"{key}: {str(path)!r} is none of {', '.join(_FORMATS)}; rename or convert it")
        if path.stat().st_size == 0:
            raise BadInput(f"{key}: {str(path)!r} is empty")
    kinds = {_FORMATS[path.suffix.lower()] for path in paths}
    if len(kinds) > 1:
        raise BadInput(f"{key}: {pattern!r} matches files of several formats: {', '.join(sorted(kinds))}")
    return paths


def _cache_key(recipe: Recipe, tokenizer: Any, sources: Mapping[str, list[Path]]) -> str:
    """A hash of the data's bytes, the tokenizer and every key that shapes what is stored."""
    digest = hashlib.sha256()
    shaping = recipe.model_dump(
        mode="json",
        include={
            "task", "dataset_name", "dataset_config_name", "train_split", "validation_split", "text_column",
            "text_pair_column", "label_column", "problem_type", "max_length", "validation_fraction",
            "max_train_samples", "max_eval_samples", "seed",
        },
    )  # fmt: skip
    shaping["format"] = PREPARED_FORMAT
    shaping["datasets"] = datasets.__version__
    shaping["sources"] = {split: [str(path) for path in paths] for split, paths in sources.items()}
    digest.update(json.dumps(shaping, sort_keys=True).encode())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    digest.update((backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))).encode())
    digest.update(repr((tokenizer.truncation_side, sorted(tokenizer.special_tokens_map.items()))).encode())
    if recipe.dataset_name is not None and "dataset" not in sources:
        for split in (recipe.train_split, recipe.validation_split):
            if split is not None:  # The hub's own hash of the data: it changes when the data set does.
                digest.update(_read_hub(recipe, split)._fingerprint.encode())
    for paths in sources.values():
        for path in paths:
            try:
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
            except OSError as error:
                raise BadInput(f"{str(path)!r} cannot be read: {error.strerror}") from None
    return digest.hexdigest()[:32]


# Reading -------------------------------------------------------------------------------------------------------------


def _read(
    split: str, recipe: Recipe, sources: Mapping[str, list[Path]], scratch: Path
) -> tuple[datasets.Dataset, str] | None:
    """One split as it came, and its name for messages; None where the recipe names none."""
    if split in sources:
        paths = sources[split]
        origin = str(paths[0]) if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
        return _read_files(paths, scratch), origin
    if recipe.dataset_name is None:
        return None
    wanted = {"train": recipe.train_split, "validation": recipe.validation_split, "test": None}[split]
    if wanted is None:
        return None
    origin = f"split {wanted!r} of {recipe.dataset_name}"
    if "dataset" in sources:
        folder = datasets.load_from_disk(recipe.dataset_name)
        if isinstance(folder, datasets.Dataset):
            if split != "train":
                raise BadInput(
                    f"validation_split: {recipe.dataset_name} has no splits; leave it out to hold some rows out"
                )
            return folder, recipe.dataset_name
        if wanted not in folder:
            raise BadInput(f"{split}_split: {recipe.dataset_name} has no split {wanted!r}; it has {', '.join(folder)}")
        return folder[wanted], origin
    return _read_hub(recipe, wanted), origin


def _read_files(paths: list[Path], scratch: Path) -> datasets.Dataset:
    kind = _FORMATS[paths[0].suffix.lower()]
    options = {"sep": "\t" if paths[0].suffix.lower() == ".tsv" else ","} if kind == "csv" else {}
    try:
        return datasets.load_dataset(
            kind, data_files=[str(path) for path in paths], split="train", cache_dir=str(scratch), **options
        )
    except Exception as error:  # The reader raises whatever its parser does; what is wrong is found by reading again.
        for path in paths:
            _diagnose(path, kind)
        cause = error.__cause__ or error
        raise BadInput(
            f"{', '.join(map(str, paths))}: cannot be read as {kind}: {' '.join(str(cause).split())}"
        ) from None


def _diagnose(path: Path, kind: str) -> None:
    """Name the line that can't be read, if it is one line's fault."""
    if kind == "parquet":
        return
    try:
        with path.open(encoding="utf-8") as file:
            if kind == "json":
                _diagnose_json(path, file)
            else:
                _diagnose_csv(path, file)
    except UnicodeDecodeError:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                try:
                    raw.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise BadInput(
                        f"{path}, line {number}: byte 0x{raw[error.start]:02x} is not UTF-8; save the file as UTF-8"
                    ) from None


def _diagnose_json(path: Path, lines: Iterable[str]) -> None:
    is_empty = True
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        is_empty = False
        try:
            row = json.loads(line)
        except ValueError as error:
            raise BadInput(f"{path}, line {number}: not valid JSON: {error}; expected one object a line") from None
        if not isinstance(row, dict):
            raise BadInput(f"{path}, line {number}: expected a JSON object, got {type(row).__name__}")
    if is_empty:
        raise BadInput(f"{path}: has no rows")


def _diagnose_csv(path: Path, lines: Iterable[str]) -> None:
    reader = csv.reader(lines, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
    width = None
    try:
        for row in reader:
            width = width if width is not None else len(row)
            if len(row) > width:
                raise BadInput(
                    f"{path}, line {reader.line_num}: {len(row)} fields where the header has {width}; "
                    "put texts that hold the separator in double quotes"
                )
    except csv.Error as error:
        raise BadInput(f"{path}, line {reader.line_num}: {error}; is a double quote left open?") from None
    if reader.line_num <= 1:
        raise BadInput(f"{path}: has no rows")


def _read_hub(recipe: Recipe, split: str) -> datasets.Dataset:
    try:
        return datasets.load_dataset(recipe.dataset_name, recipe.dataset_config_name, split=split)
    except Exception as error:  # The hub's client has no common error: no network, no such name, no such split, ...
        reason = " ".join(str(error).split())
        raise BadInput(
            f"dataset_name: {recipe.dataset_name!r} (split {split!r}) could not be loaded from the hub or its cache: {reason}. "
            "Without a network, give local files as train_file, or a save_to_disk folder as dataset_name"
        ) from None


# Building ------------------------------------------------------------------------------------------------------------


def _build(
    folder: Path, recipe: Recipe, task: TextClassification, tokenizer: Any, sources: Mapping[str, list[Path]]
) -> None:
    """Read, check, split, tokenize, and publish all at once by a rename."""
    check_launcher()  # It may have died while this process waited for its turn.
    staging = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        scratch = staging / "scratch"
        read = {split: _read(split, recipe, sources, scratch) for split in ("train", "validation", "test")}
        raw = {split: found for split, found in read.items() if found is not None}
        for table, origin in raw.values():
            _check_columns(table, task, origin)
        train, origin = raw["train"]
        task.label_names = task.find_label_names(train.data.table, _declared_names(train, task), origin)
        labels = {split: _encode(table, task, origin) for split, (table, origin) in raw.items()}
        chosen: dict[str, tuple[datasets.Dataset, Array, str, Array]] = {}
        for split, (table, origin) in raw.items():
            chosen[split] = (table, labels[split], origin, np.arange(len(table)))
        if "validation" not in chosen:
            kept, held_out = hold_out(len(train), task.strata(labels["train"]), recipe.validation_fraction, recipe.seed)
            if not len(kept) or not len(held_out):
                raise BadInput(
                    f"{origin}: {len(train)} rows are too few to hold out {recipe.validation_fraction:g} of them"
                )
            chosen["validation"] = (train, labels["train"], f"rows held out of {origin}", held_out)
            chosen["train"] = (train, labels["train"], origin, kept)
        for split, limit in (("train", recipe.max_train_samples), ("validation", recipe.max_eval_samples)):
            table, encoded, origin, rows = chosen[split]
            chosen[split] = (
                table,
                encoded,
                origin,
                _subset(rows, limit, recipe.seed, f"max_{split[:5]}_samples", origin),
            )
        digests = {
            split: _tokenize(staging, split, table, encoded, rows, task, tokenizer)
            for split, (table, encoded, _, rows) in chosen.items()
        }
        origins = {split: entry[2] for split, entry in chosen.items()}
        meta = {"label_names": task.label_names, "origins": origins, "digests": digests}
        (staging / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
        shutil.rmtree(scratch, ignore_errors=True)
        staging.rename(folder)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _check_columns(table: datasets.Dataset, task: TextClassification, origin: str) -> None:
    if not len(table):
        raise BadInput(f"{origin}: has no rows")
    for key, names in (("text_column", task.text_columns), ("label_column", task.label_columns)):
        for name in names:
            if name not in table.column_names:
                nearest = find_nearest(name, table.column_names)
                hint = f"; did you mean {nearest}?" if nearest else ""
                raise BadInput(
                    f"{origin}: {key} {name!r} is not a column; it has {', '.join(table.column_names)}{hint}"
                )
    for name in task.text_columns:
        kind = table.features[name]
        if getattr(kind, "dtype", None) not in ("string", "large_string"):
            raise BadInput(f"{origin}: text column {name!r} must hold text, it holds {getattr(kind, 'dtype', kind)}")
        for row, text in enumerate(_iterate(table, name), start=1):
            if text is None or not text.strip():
                raise BadInput(f"{origin}, row {row}: text column {name!r} is empty; fill or remove the row")


def _iterate(table: datasets.Dataset, column: str) -> Iterable[str | None]:
    for batch in table.select_columns([column]).iter(batch_size=_ROWS_PER_TOKENIZER_CALL):
        check_launcher()
        yield from batch[column]


def _declared_names(table: datasets.Dataset, task: TextClassification) -> list[str] | None:
    """Names that a data set's own schema gives its classes, such as yelp_review_full's "1 star"."""
    feature = table.features[task.label_columns[0]]
    feature = getattr(feature, "feature", feature)
    return list(feature.names) if isinstance(feature, datasets.ClassLabel) else None


def _encode(table: datasets.Dataset, task: TextClassification, origin: str) -> Array:
    plain = table.flatten_indices() if table._indices is not None else table
    return task.encode_labels(plain.data.table, _declared_names(table, task), origin)


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


def _tokenize(
    staging: Path,
    split: str,
    table: datasets.Dataset,
    labels: Array,
    rows: Array,
    task: TextClassification,
    tokenizer: Any,
) -> str:
    """Write a split's tokens, lengths and labels; returns their digest."""
    columns = table.select_columns(task.text_columns)
    if len(rows) != len(table) or not np.array_equal(rows, np.arange(len(table))):
        columns = columns.select(rows)
    (staging / "scratch").mkdir(exist_ok=True)

    def tokenize(batch: Mapping[str, Any]) -> Any:
        check_launcher()
        return task.tokenize(tokenizer, batch)

    tokens = columns.map(
        tokenize,
        batched=True,
        batch_size=_ROWS_PER_TOKENIZER_CALL,
        remove_columns=columns.column_names,
        cache_file_name=str(staging / "scratch" / f"{split}.arrow"),
        new_fingerprint=f"{staging.name.strip('.').replace('.', '')[:32]}{split}",
    )
    lengths = np.empty(len(tokens), dtype=np.int32)
    start = 0
    digest = hashlib.sha256(json.dumps(task.label_names).encode())
    for batch in tokens.select_columns(["input_ids"]).with_format("arrow").iter(batch_size=100_000):
        column = batch.column("input_ids").combine_chunks()
        lengths[start : start + len(column)] = column.value_lengths().to_numpy(zero_copy_only=False)
        start += len(column)
        digest.update(column.flatten().to_numpy(zero_copy_only=False).astype("<i4").data)
    tokens.save_to_disk(str(staging / split))
    np.save(staging / f"{split}.lengths.npy", lengths)
    np.save(staging / f"{split}.labels.npy", labels[rows])
    digest.update(lengths.astype("<i4").data)
    digest.update(np.ascontiguousarray(labels[rows]).data)
    return digest.hexdigest()


# Batches -------------------------------------------------------------------------------------------------------------


class MicroBatches(torch.utils.data.Dataset[dict[str, Any]]):
    """Turns a planned micro-batch into tensors: pads to its longest example and carries the plan along."""

    def __init__(self, split: Split, tokenizer: Any) -> None:
        self.split = split
        self.pad_token_id = tokenizer.pad_token_id
        self.pads_left = tokenizer.padding_side == "left"

    def __len__(self) -> int:
        return len(self.split)

    def __getitems__(self, plan: MicroBatch) -> dict[str, Any]:
        """The tensors of one micro-batch.

        Returns:
            input_ids, attention_mask, ... [examples, longest] int64; labels; and the plan itself.
        """
        rows = self.split.tokens[plan.indices]
        batch = {
            name: self._pad(values, self.pad_token_id if name == "input_ids" else 0) for name, values in rows.items()
        }
        batch["attention_mask"] = self._pad([np.ones_like(values) for values in rows["input_ids"]], 0)
        return {**batch, "labels": torch.from_numpy(np.array(self.split.labels[plan.indices])), "plan": plan}

    def _pad(self, rows: Iterable[Array], value: int) -> torch.Tensor:
        rows = list(rows)
        padded = np.full((len(rows), max(map(len, rows))), value, dtype=np.int64)
        for target, row in zip(padded, rows, strict=True):
            if self.pads_left:
                target[-len(row) :] = row
            else:
                target[: len(row)] = row
        return torch.from_numpy(padded)


def _as_it_is(batch: dict[str, Any]) -> dict[str, Any]:
    return batch


def _leave_stops_to_the_rank(worker: int) -> None:
    """Torch's agent and terminals signal a rank and its workers: a worker that died of it would fail the rank's save.

    The rank ends its workers without a signal, and they end by themselves when the rank is gone.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def build_loader(
    split: Split, tokenizer: Any, plan: TrainingPlan | EvaluationPlan, recipe: Recipe, accelerator: Accelerator
) -> DataLoader[dict[str, Any]]:
    """A loader over planned micro-batches, to be prepared: accelerate deals micro-batch i to process i mod P."""
    return DataLoader(
        MicroBatches(split, tokenizer),
        batch_sampler=plan,  # type: ignore[arg-type]  # yields micro-batches, not lists of numbers
        collate_fn=_as_it_is,  # type: ignore[arg-type]  # the data set collates: it alone knows the plan
        num_workers=recipe.dataloader_num_workers,
        worker_init_fn=_leave_stops_to_the_rank,
        pin_memory=accelerator.device.type == "cuda",
        # A loader draws a seed when it starts; from its own generator, or dropout's numbers would depend on how often.
        generator=torch.Generator().manual_seed(recipe.seed),
    )
