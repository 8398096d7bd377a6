"""The text of a recipe that `onecurve init` writes: keys in the order in which one reads them, each with its why."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

_WIDTH = 110
# The headings, and the keys below each; keys of a task that stand in none of them come first, with the columns.
_DATA = ("dataset_name", "dataset_config_name", "train_split", "validation_split", "train_file", "validation_file", "test_file",
         "validation_fraction")  # fmt: skip
_SECTIONS: Mapping[str, tuple[str, ...]] = {
    "Lengths, in tokens": ("max_length", "max_target_length", "doc_stride"),
    "A step: the same on every machine": (
        "train_batch_size", "learning_rate", "lr_scheduler_type", "warmup_ratio", "weight_decay", "num_train_epochs",
        "max_train_steps", "mixed_precision", "adapter", "seed",
    ),
    "Memory and speed: change them freely": ("per_device_batch_size", "per_device_batch_tokens"),
    "Evaluation, and what is left": ("eval_steps", "metric_for_best_model", "output_dir"),
}  # fmt: skip


def write_recipe(
    head: Sequence[str], keys: Mapping[str, Any], comments: Mapping[str, str], optional: Mapping[str, Any]
) -> str:
    """The text of the recipe.

    Args:
        head: lines above it, for people.
        comments: by key, what stands above it.
        optional: keys that are written as comments.
    """
    lines = [f"# {line}".rstrip() for line in head]
    known = {"task", "model_name_or_path", *_DATA, *(key for section in _SECTIONS.values() for key in section)}
    own = [key for key in (*keys, *optional) if key not in known]
    sections = {"": ("task", "model_name_or_path"), "The data": _DATA, "What is read and learned": tuple(dict.fromkeys(own)),
                **_SECTIONS}  # fmt: skip
    for heading, names in sections.items():
        present = [name for name in names if name in keys or name in optional]
        if present:
            lines += ["", *([f"# {heading}"] if heading else [])]
            for name in present:
                lines += _write_key(name, keys, comments, optional)
    return "\n".join(lines) + "\n"


def _write_key(
    name: str, keys: Mapping[str, Any], comments: Mapping[str, str], optional: Mapping[str, Any]
) -> Iterator[str]:
    value = f"{name}: {dump(keys[name] if name in keys else optional[name])}"
    line = value if name in keys else f"# {value}"
    comment = comments.get(name, "")
    if comment and len(line) + len(comment) + 4 <= _WIDTH:
        yield f"{line}  # {comment}"
        return
    yield from textwrap.wrap(comment, _WIDTH, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)
    yield line


def dump(value: Any) -> str:
    """A value in YAML, on one line."""
    text: str = yaml.safe_dump(value, default_flow_style=True, width=math.inf, allow_unicode=True)
    if yaml.safe_load(text) != value:  # YAML folds some rare spaces.
        text = yaml.safe_dump(value, default_flow_style=True, width=math.inf)
    return text.removesuffix("...\n").rstrip("\n")
