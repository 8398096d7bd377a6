"""How many examples a recipe trains on, and how long they are, estimated from its files."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from onecurve.launcher.facts.model_files import find_config
from onecurve.launcher.facts.recipes import find_columns, find_processor_kind
from onecurve.launcher.facts.text_lengths import count_tokens
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
    """

    num_examples: int | None
    mean_length: float
    longest: int
    padding: float
    source: str


def count_examples(recipe: Recipe) -> int | None:
    """Number of training examples; None if the data is not in files.

    Raises:
        BadInput: a file can't be read.
    """
    if recipe.train_file is None:
        return None
    num_examples = sum(count_rows(path) for path in find_files("train_file", recipe.train_file))
    if recipe.validation_file is None:
        num_examples -= round(num_examples * recipe.validation_fraction)
    return min(num_examples, recipe.max_train_samples or num_examples)


def count_recipe_steps(recipe: Recipe, num_examples: int | None) -> tuple[int | None, int | None]:
    """Steps of an epoch and of the whole training; None for what is not known."""
    if not num_examples:
        return None, recipe.max_train_steps
    steps_per_epoch = count_steps_per_epoch(recipe, num_examples)
    return steps_per_epoch, count_steps(recipe, steps_per_epoch)


def text_columns(recipe: Recipe) -> list[str]:
    """The columns whose texts are tokenized into one example."""
    return [name for names in find_columns(recipe, with_targets=False).values() for name in names]


def estimate_data(recipe: Recipe) -> DataEstimate:
    """Rows and lengths of the training data, if it is on this machine."""
    if not find_processor_kind(recipe).counts_texts:
        return _estimate_images(recipe)
    if recipe.train_file is None:
        return DataEstimate(recipe.max_train_samples, recipe.max_length, recipe.max_length, 0.0, "not on this machine")
    try:
        paths = find_files("train_file", recipe.train_file)
        num_examples = count_examples(recipe)
        texts = []
        for path in paths[:4]:
            for row in read_head(path, _ROWS_SAMPLED // min(4, len(paths))).rows:
                found = [row.get(column) for column in text_columns(recipe)]
                texts.append(" ".join(text for text in found if isinstance(text, str)))
    except BadInput:
        return DataEstimate(recipe.max_train_samples, recipe.max_length, recipe.max_length, 0.0, "not readable here")
    if not texts or not num_examples:
        return DataEstimate(num_examples or None, recipe.max_length, recipe.max_length, 0.0, "no rows")
    counts, is_counted = count_tokens(texts, recipe.tokenizer_name or recipe.model_name_or_path)
    lengths = [min(count, recipe.max_length) for count in counts]
    source = f"{'tokenizer' if is_counted else 'characters'}, {len(texts)} rows"
    return DataEstimate(
        num_examples, sum(lengths) / len(lengths), max(lengths), estimate_padding(lengths, recipe), source
    )


def _estimate_images(recipe: Recipe) -> DataEstimate:
    """Every example has the model's own number of patches."""
    config = find_config(recipe.model_name_or_path)
    try:
        patches = count_patches(json.loads(config.read_text(encoding="utf-8"))) if config is not None else 1
        num_examples = count_examples(recipe)
    except (BadInput, OSError, ValueError):
        return DataEstimate(recipe.max_train_samples, 1, 1, 0.0, "not readable here")
    return DataEstimate(num_examples or recipe.max_train_samples, patches, patches, 0.0, "patches of an image")


def estimate_padding(lengths: Sequence[int], recipe: Recipe) -> float:
    """Share of padding in batches as training/data/plan.py makes them: windows sorted by length, then cut."""
    shuffled = list(lengths)
    random.Random(recipe.seed).shuffle(shuffled)
    window = recipe.length_window * recipe.train_batch_size
    size = min(recipe.per_device_batch_size, recipe.train_batch_size)
    real = padded = 0
    for start in range(0, len(shuffled), window):
        part = sorted(shuffled[start : start + window])
        for piece in (part[number : number + size] for number in range(0, len(part), size)):
            real += sum(piece)
            padded += len(piece) * piece[-1]
    return 1 - real / padded if padded else 0.0
