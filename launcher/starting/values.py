"""Values of a recipe that the data and this machine suggest: lengths, batches, precision, the share that is held out."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from onecurve.launcher.errors import UnreadableModel
from onecurve.launcher.facts.machine import Machine
from onecurve.launcher.facts.model_files import find_config
from onecurve.launcher.facts.recipes import predicts_tokens
from onecurve.launcher.facts.shape import ModelShape, load_shape
from onecurve.launcher.facts.text_lengths import Counter
from onecurve.launcher.planning.memory import CPU_OVERHEAD_BYTES, GPU_OVERHEAD_BYTES, estimate_memory, fits
from onecurve.launcher.planning.work import build_work
from onecurve.training.architectures import count_patches, count_positions
from onecurve.training.config import Recipe, build_recipe, known_keys
from onecurve.training.tasks import find_task
from onecurve.training.tasks.fits import Fit

# Where no other key, no model and no task says more: what most encoders read.
_MOST_TOKENS = 512
_FEWEST_TOKENS = 16
_QUANTILE = 0.99
# docs/speed.md: on a CPU a few thousand tokens fit its caches; a GPU needs more to be busy.
_TOKENS_ON_CPU, _TOKENS_ON_GPU = 4_096, 16_384
_SMALL_DATA = 2_000
_FEW_ROWS, _MOST_HELD_OUT = 1_000, 10_000
# Compute capability of Ampere, the first with bf16.
_BF16_CAPABILITY = 8.0
_LORA_LEARNING_RATE = 2e-4


@dataclass(frozen=True)
class Lengths:
    """Tokens of the texts that one recipe key bounds.

    Attributes:
        value: for that key.
        share_cut: of the texts, those that are longer than it.
        is_counted: by the model's tokenizer; else estimated.
    """

    value: int
    mean: float
    quantile: int
    most: int
    share_cut: float
    num_texts: int
    is_counted: bool

    def describe(self) -> str:
        """Where the value comes from, in one line."""
        how = (
            "counted by the tokenizer"
            if self.is_counted
            else "estimated from their characters: the model's tokenizer is not on this machine"
        )
        line = f"99 % of {self.num_texts:,} texts have at most {self.quantile:,} tokens, {how}"
        return f"{line}; {self.share_cut:.0%} are longer than this" if self.share_cut > 1 - _QUANTILE + 0.005 else line


@dataclass
class Values:
    """Recipe keys, and what to say beside some of them.

    Attributes:
        given: keys that the user gave; they are kept.
    """

    given: Mapping[str, Any]
    keys: dict[str, Any] = field(default_factory=dict)
    comments: dict[str, str] = field(default_factory=dict)
    lengths: dict[str, Lengths] = field(default_factory=dict)

    def set(self, key: str, value: Any, comment: str = "") -> None:
        """Set a key, with a comment or without one, unless the user gave it."""
        self.keys[key] = self.given.get(key, value)
        if comment:
            self.comments[key] = comment


def read_config(model: str) -> dict[str, Any]:
    """A model's config.json, in its folder or in the hub's cache; empty where it is not on this machine."""
    path = find_config(model)
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path is not None else {}
    except (OSError, ValueError):
        return {}
    return config


def measure(fit: Fit, model: str, config: Mapping[str, Any]) -> dict[str, Lengths]:
    """Lengths of the texts, and what each key that bounds them should be."""
    positions = count_positions(config) if config else None
    counter, found = Counter(model), {}
    special = counter.count_special(1)
    for key, texts in fit.lengths.items():
        lengths = sorted(counter.count(text) + special for text in texts if text)
        if not lengths:
            continue
        quantile = lengths[min(len(lengths) - 1, math.ceil(_QUANTILE * len(lengths)) - 1)]
        most = fit.longest.get(key, _MOST_TOKENS)
        value = min(max(_FEWEST_TOKENS, 8 * math.ceil(quantile / 8)), most, positions or most)
        cut = sum(length > value for length in lengths) / len(lengths)
        mean = sum(lengths) / len(lengths)
        found[key] = Lengths(value, mean, quantile, lengths[-1], cut, len(lengths), counter.is_counted)
    return found


def choose_values(
    task: str, fit: Fit, named: Mapping[str, Any], given: Mapping[str, Any], num_rows: int, machine: Machine
) -> Values:
    """Keys of a recipe beside the task, the model, the data and the columns.

    Args:
        named: keys of the model, the data and the columns.
        given: keys that the user gave.
        num_rows: to train on.
    """
    values = Values(given)
    model = str(named["model_name_or_path"])
    values.lengths = measure(fit, str(given.get("tokenizer_name", model)), read_config(model))
    for key, lengths in values.lengths.items():
        values.set(key, lengths.value, lengths.describe())
    for key, (whole, share) in fit.shares.items():
        if whole in values.keys:
            values.set(key, int(share * values.keys[whole]))
    if not {"validation_file", "validation_split"} & (named.keys() | given.keys()):
        share = 0.2 if num_rows < _FEW_ROWS else max(0.01, round(min(0.1, _MOST_HELD_OUT / num_rows), 3))
        values.set("validation_fraction", share, "there is no validation data: this share of the rows is held out")
    values.set("train_batch_size", 16 if num_rows < _SMALL_DATA else 32, "examples of a step, over all processes")
    values.set("learning_rate", fit.training.get("learning_rate", 5e-5))
    if machine.kind == "cuda" and all(device.compute_capability >= _BF16_CAPABILITY for device in machine.devices):
        values.set("mixed_precision", "bf16", "this GPU is several times faster in it")
    _set_memory(values, task, named, machine)
    values.set("warmup_ratio", 0.1)
    values.set("weight_decay", 0.01)
    values.set("num_train_epochs", 3)
    for key, value in fit.training.items():
        if key != "learning_rate":
            values.set(key, value)
    values.comments = {**fit.comments, **values.comments}
    return values


def _set_memory(values: Values, task: str, named: Mapping[str, Any], machine: Machine) -> None:
    """The largest micro-batch that fits this machine, and an adapter where nothing else does."""
    if {"per_device_batch_size", "per_device_batch_tokens"} & values.given.keys():
        return
    counts_texts = find_task(task).processor_kind.counts_texts
    model = str(named["model_name_or_path"])
    length = values.keys.get("max_length", _MOST_TOKENS) if counts_texts else count_patches(read_config(model)) + 1
    budget = _TOKENS_ON_GPU if machine.devices else _TOKENS_ON_CPU
    sizes = [size for size in (32, 16, 8, 4, 2, 1) if size <= values.keys["train_batch_size"]]
    shape = _load_shape(task, named)
    if shape is None:
        why = "the model is not on this machine, so nothing is computed: lower it if memory is short"
        values.set("per_device_batch_size", min(sizes[0], 16), why)
        if counts_texts:
            values.set("per_device_batch_tokens", max(length, budget // 2), _TOKENS_COMMENT)
        return
    adapters: list[dict[str, Any]] = [{}]
    if machine.devices and find_task(task).peft_task_type is not None and "adapter" not in values.given:
        adapters.append({"adapter": "lora", "learning_rate": _LORA_LEARNING_RATE})
    for adapter in adapters:
        for size in sizes:
            tokens = {"per_device_batch_tokens": max(length, min(budget, size * length))} if counts_texts else {}
            micro_batch = {"per_device_batch_size": size, **tokens}
            recipe = _build(task, {**named, **values.keys, **adapter, **values.given, **micro_batch})
            if _fits(recipe, shape, length, machine):
                values.set("per_device_batch_size", size, f"fits this machine: {machine.describe()}")
                for key, value in tokens.items():
                    values.set(key, value, _TOKENS_COMMENT)
                for key, value in adapter.items():
                    values.set(key, value, _ADAPTER_COMMENT if key == "adapter" else "")
                return
    values.set("per_device_batch_size", 1, "even one example of max_length may need more memory than this machine has")


_TOKENS_COMMENT = "and tokens: short texts go through the model in larger micro-batches than long ones"
_ADAPTER_COMMENT = "all weights of this model do not fit this machine's training"


def _build(task: str, keys: Mapping[str, Any]) -> Recipe:
    read = known_keys(find_task(task))
    return build_recipe({key: value for key, value in keys.items() if key in read})


def _load_shape(task: str, named: Mapping[str, Any]) -> ModelShape | None:
    try:
        return load_shape(str(named["model_name_or_path"]), predicts_tokens(_build(task, named)))
    except UnreadableModel:
        return None


def _fits(recipe: Recipe, shape: ModelShape, length: int, machine: Machine) -> bool:
    """Whether one device holds the whole step; what does not may still be sharded over several, which `run` chooses."""
    work = build_work(recipe, shape, machine.kind, length, max(1, len(machine.devices)))
    memory = estimate_memory(shape, "one process", work, 1)
    if machine.devices:
        return fits(memory, min(device.memory_bytes for device in machine.devices), GPU_OVERHEAD_BYTES)
    return fits(memory, machine.memory_bytes, CPU_OVERHEAD_BYTES)
