"""How many examples a recipe trains on, and how long they are, estimated from its files."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

from onecurve.launcher.facts.model_files import find_config
from onecurve.launcher.facts.recipes import (
    estimate_examples,
    find_processor_kind,
    gives_one_example_a_row,
    holds_out_by_label,
)
from onecurve.launcher.facts.text_lengths import Counter
from onecurve.training.architectures import count_patches
from onecurve.training.data.sources import find_files
from onecurve.training.data.tables import count_rows, read_head
from onecurve.training.errors import BadInput
from onecurve.training.schedule import count_steps, count_steps_per_epoch

if TYPE_CHECKING:
    from onecurve.training.config import Recipe

_ROWS_SAMPLED = 500


@dataclass(frozen=True)
class DataEstimate:
    """The training data in numbers.

    Rows are counted, which reads a whole CSV file; lengths come from the first rows of some files.

    Attributes:
        num_examples: None if the data is not on this machine.
        mean_length: tokens of an example, cut to max_length.
        longest: tokens of the longest example seen.
        padding: share of all tokens that are padding, in batches by length as the training makes them.
        source: where the lengths come from, for people to read.
        num_rows: that are trained on; None as `num_examples`.
        doubt: why the training may count other examples than these; empty where it counts the same.
        mean_sequences, most_sequences: that go through the model for an example, such as choices.
    """

    num_examples: int | None
    mean_length: float
    longest: int
    padding: float
    source: str
    num_rows: int | None = None
    doubt: str = ""
    mean_sequences: float = 1.0
    most_sequences: int = 1


def count_train_rows(recipe: Recipe) -> int | None:
    """Number of rows to train on; None if the data is not in files.

    Raises:
        BadInput: a file can't be read.
    """
    if recipe.train_file is None:
        return None
    num_rows = sum(count_rows(path) for path in find_files("train_file", recipe.train_file))
    if recipe.validation_file is None:
        num_rows -= min(max(round(num_rows * recipe.validation_fraction), 1), max(num_rows - 1, 0))
    return min(num_rows, recipe.max_train_samples or num_rows)


def find_doubt(recipe: Recipe) -> str:
    """Why there may be more or fewer examples than rows; empty where there are as many."""
    if not gives_one_example_a_row(recipe):
        return "a row can give several examples or none"
    if (
        holds_out_by_label(recipe)
        and recipe.train_file is not None
        and recipe.validation_file is None
        and recipe.max_train_samples is None
    ):
        return "each label's share that is held out is rounded"
    return ""


def count_recipe_steps(recipe: Recipe, num_examples: int | None) -> tuple[int | None, int | None]:
    """Steps of an epoch and of the whole training; None for what is not known."""
    if not num_examples:
        return None, recipe.max_train_steps
    steps_per_epoch = count_steps_per_epoch(recipe, num_examples)
    return steps_per_epoch, count_steps(recipe, steps_per_epoch)


def estimate_data(recipe: Recipe) -> DataEstimate:
    """Rows and lengths of the training data, if it is on this machine."""
    if not find_processor_kind(recipe).counts_texts:
        return _estimate_images(recipe)
    if recipe.train_file is None:
        return _build_unknown(recipe, recipe.max_train_samples, "not on this machine")
    try:
        paths = find_files("train_file", recipe.train_file)
        num_rows = count_train_rows(recipe)
        rows = [row for path in paths[:4] for row in read_head(path, _ROWS_SAMPLED // min(4, len(paths))).rows]
    except BadInput:
        return _build_unknown(recipe, recipe.max_train_samples, "not readable here")
    counter = Counter(recipe.tokenizer_name or recipe.model_name_or_path)
    examples = estimate_examples(recipe, rows, counter)
    if not examples or not num_rows:
        return _build_unknown(recipe, num_rows or None, "no rows that the task can read" if rows else "no rows")
    lengths, sizes = list(map(sum, examples)), list(map(len, examples))
    is_one_each = gives_one_example_a_row(recipe)
    return DataEstimate(
        num_examples=num_rows if is_one_each else round(num_rows * len(examples) / len(rows)),
        mean_length=sum(lengths) / len(lengths),
        longest=max(lengths),
        padding=estimate_padding(examples, recipe),
        source=f"{'tokenizer' if counter.is_counted else 'characters'}, {len(rows)} rows",
        num_rows=num_rows,
        doubt=find_doubt(recipe),
        mean_sequences=sum(sizes) / len(sizes),
        most_sequences=max(sizes),
    )


def count_sequences(recipe: Recipe) -> int:
    """Most sequences that an example of the first rows puts through the model, such as choices; 1 where nothing is known."""
    if recipe.train_file is None or not find_processor_kind(recipe).counts_texts:
        return 1
    try:
        rows = read_head(find_files("train_file", recipe.train_file)[0], _ROWS_SAMPLED).rows
    except BadInput:
        return 1
    counter = Counter(None)  # Their lengths are of no matter here.
    return max(map(len, estimate_examples(recipe, rows, counter)), default=1)


def _build_unknown(recipe: Recipe, num_rows: int | None, source: str) -> DataEstimate:
    """As long as may be."""
    longest = recipe.max_length
    return DataEstimate(num_rows, longest, longest, 0.0, source, num_rows, find_doubt(recipe))


def _estimate_images(recipe: Recipe) -> DataEstimate:
    """Every example has the model's own number of patches."""
    config = find_config(recipe.model_name_or_path)
    try:
        patches = count_patches(json.loads(config.read_text(encoding="utf-8"))) if config is not None else 1
        num_rows = count_train_rows(recipe) or recipe.max_train_samples
    except (BadInput, OSError, ValueError):
        return DataEstimate(recipe.max_train_samples, 1, 1, 0.0, "not readable here", recipe.max_train_samples)
    source, doubt = "patches of an image", find_doubt(recipe)
    return DataEstimate(num_rows, patches, patches, 0.0, source, num_rows, doubt)


def estimate_padding(examples: Sequence[Sequence[int]], recipe: Recipe) -> float:
    """Share of padding in batches as training/data/plan.py makes them: windows sorted by length, then cut.

    Args:
        examples: of each the tokens of its sequences; all sequences of a micro-batch are padded to its longest.
    """
    shuffled = list(examples)
    random.Random(recipe.seed).shuffle(shuffled)
    window = recipe.length_window * recipe.train_batch_size
    size = min(recipe.per_device_batch_size, recipe.train_batch_size)
    real = padded = 0
    for start in range(0, len(shuffled), window):
        part = sorted(shuffled[start : start + window], key=sum)
        for piece in (part[number : number + size] for number in range(0, len(part), size)):
            sequences = list(chain.from_iterable(piece))
            real += sum(sequences)
            padded += len(sequences) * max(sequences)
    return 1 - real / padded if padded else 0.0
