"""In what two runs differ, of all that a run directory records, and what each difference can do to a curve."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from onecurve.launcher.facts.history import History
from onecurve.training.recipe import DataKeys, MemoryKeys, OutputKeys, Recipe
from onecurve.training.run_directory import RunDirectory

Effect = Literal["examples", "forward", "rate", "update", "rounding", "evaluation", "length"]
"""What a difference changes first: which examples a step sees, the loss of the same examples, the learning rate, what an
update does with a gradient, only last digits, only evaluations, the number of steps."""

Category = Literal["data", "recipe", "model", "versions", "device", "topology", "starts"]
CATEGORIES: tuple[Category, ...] = ("data", "recipe", "model", "versions", "device", "topology", "starts")
"""In the order in which they are suspected where the curves don't tell them apart."""

_ANYTHING: frozenset[Effect] = frozenset({"examples", "forward", "rate", "update", "evaluation"})

_EFFECTS: dict[str, set[Effect]] = {
    "seed": {"examples", "forward"},
    "train_batch_size": {"examples"},
    "length_window": {"examples"},
    "learning_rate": {"rate"},
    "lr_scheduler_type": {"rate"},
    "num_warmup_steps": {"rate"},
    "warmup_ratio": {"rate"},
    "num_train_epochs": {"rate", "length"},
    "max_train_steps": {"rate", "length"},
    "layerwise_lr_decay": {"update"},
    "weight_decay": {"update"},
    "max_grad_norm": {"update"},
    "adam_beta1": {"update"},
    "adam_beta2": {"update"},
    "adam_epsilon": {"update"},
    "freeze": {"update"},
    "early_stopping_patience": {"length"},
    "metric_for_best_model": {"length", "evaluation"},
    "eval_steps": {"length", "rate"},
    "max_eval_samples": {"evaluation"},
    "model_name_or_path": {"forward", "examples"},
    "tokenizer_name": {"examples"},
    "adapter": {"forward", "update"},
    "validation_file": {"evaluation"},
    "validation_split": {"evaluation"},
    "test_file": {"evaluation"},
    "attn_implementation": {"rounding"},
    "resume": {"forward"},
}
"""Of the recipe's keys; of those that are not here their group decides."""

_ROUNDING: frozenset[Effect] = frozenset({"rounding"})
_FORWARD: frozenset[Effect] = frozenset({"forward", "rounding"})

_OF_PACKAGES: dict[str, frozenset[Effect]] = {
    "onecurve": _ANYTHING,
    "transformers": frozenset({"examples", "forward", "rounding"}),
    "tokenizers": frozenset({"examples"}),
    "datasets": frozenset({"examples"}),
    "evaluate": frozenset({"evaluation"}),
}

# Where these lie says nothing: their contents are compared, where both runs recorded them.
_SOURCES_OF_KEYS = {
    "train_file": ("train",),
    "validation_file": ("validation",),
    "test_file": ("test",),
    "dataset_name": ("folder", "hub"),
}
_MODEL_PATHS = ("model_name_or_path", "adapter_name_or_path", "tokenizer_name")

Pair = tuple[Mapping[str, Any], Mapping[str, Any]]
"""The same part of the environments of two runs."""

Starts = Sequence[tuple[int, Mapping[str, Any]]]
"""(Steps made before, environment) of each start of a run."""


@dataclass(frozen=True)
class Difference:
    """One thing in which two runs differ.

    Attributes:
        name: a recipe's key, a package, a field of the topology, or what of the data or the model.
        values: of both runs.
        effects: what it can do to a curve.
        step: the first step that was made with it.
    """

    category: Category
    name: str
    values: tuple[Any, Any]
    effects: frozenset[Effect]
    step: int = 1


def find_differences(one: History, other: History, last_step: int) -> list[Difference]:
    """All differences between two runs that were there by a step, the most suspect categories first.

    Args:
        last_step: starts after it are not looked at.
    """
    starts = _read_starts(one), _read_starts(other)
    inputs = _read_inputs(starts[0]), _read_inputs(starts[1])
    roots = [
        *_compare_sources(one, other, inputs),
        *_compare_named_files(inputs),
        *_compare_settings(one, other, inputs),
        *_compare_models(inputs),
    ]
    found = [*roots, *_compare_environments(*starts, last_step, _draws_by_process(one) or _draws_by_process(other))]
    if not any("examples" in each.effects for each in roots):
        found += _compare_examples(inputs)
    found += _compare_restarts(*starts, last_step)
    return sorted(found, key=lambda each: CATEGORIES.index(each.category))


def _read_starts(history: History) -> Starts:
    """All starts. Earlier versions did not record the step: theirs count as the first."""
    environments = RunDirectory(history.path).read_environments() or [{}]
    steps = (environment.get("start_step") for environment in environments)
    return [
        (step if isinstance(step, int) else 0, environment)
        for step, environment in zip(steps, environments, strict=True)
    ]


def _read_inputs(starts: Starts) -> Mapping[str, Any]:
    """What the first start was given to learn from; empty for runs of earlier versions."""
    inputs = starts[0][1].get("inputs")
    return inputs if isinstance(inputs, Mapping) else {}


def _compare(inputs: Pair, *keys: str) -> tuple[Any, Any] | None:
    """The values under a path of keys, where both have one and they differ."""
    values: list[Any] = list(inputs)
    for key in keys:
        values = [value.get(key) if isinstance(value, Mapping) else None for value in values]
    return (values[0], values[1]) if None not in values and values[0] != values[1] else None


def _agree(inputs: Pair, *keys: str) -> bool:
    """Whether both have the same value under a path of keys."""
    values: list[Any] = list(inputs)
    for key in keys:
        values = [value.get(key) if isinstance(value, Mapping) else None for value in values]
    return values[0] is not None and values[0] == values[1]


def _compare_sources(one: History, other: History, inputs: Pair) -> Iterator[Difference]:
    """Files, or data of the hub, whose content is another; but not where the same examples came out in the same order."""
    for key, sources in _SOURCES_OF_KEYS.items():
        for source in sources:
            split = source if key.endswith("_file") else "train"
            if _compare(inputs, "sources", source) is None or _agree(inputs, "data", split, "digest"):
                continue
            what = "order of its examples" if _agree(inputs, "data", split, "contents") else "content"
            effects: set[Effect] = {"evaluation"} if split == "test" else {"evaluation", "forward"}
            if split == "train":
                is_held_out = not all("validation" in each.get("sources", {}) for each in inputs)
                effects = {"examples", "forward", "evaluation"} if is_held_out else {"examples", "forward"}
            values = one.settings.get(key), other.settings.get(key)
            yield Difference("data", f"{what} of {key}", values, frozenset(effects))


def _compare_named_files(inputs: Pair) -> Iterator[Difference]:
    """Files that the rows name, such as images."""
    if (values := _compare(inputs, "sources", "files")) and not _agree(inputs, "data", "train", "digest"):
        yield Difference("data", "content of the files that rows name", values, frozenset({"examples", "forward"}))


def _compare_examples(inputs: Pair) -> Iterator[Difference]:
    """Prepared examples that differ although nothing that they were prepared from does."""
    of_split: dict[str, Effect] = {"train": "examples", "validation": "evaluation"}
    for split, effect in of_split.items():
        if values := _compare(inputs, "data", split, "digest"):
            yield Difference("data", f"prepared {split} examples", values, frozenset({effect}))


def _compare_settings(one: History, other: History, inputs: Pair) -> Iterator[Difference]:
    for key in dict.fromkeys([*one.settings, *other.settings]):
        values = _read_setting(one, key), _read_setting(other, key)
        if values[0] == values[1] or _is_compared_by_content(key, inputs) or not _has_effect(key, values, one, other):
            continue
        effects = _effects_of_key(key, _draws_by_process(one) or _draws_by_process(other))
        if key in ("validation_file", "validation_split") and None in values:
            effects |= {"examples"}  # One of them held rows of the training data out.
        yield Difference("recipe", key, values, effects)


def _read_setting(history: History, key: str) -> Any:
    """The value of a key; the default where an earlier version wrote none."""
    field = Recipe.model_fields.get(key)
    return history.settings.get(key, None if field is None or field.is_required() else field.default)


def _is_compared_by_content(key: str, inputs: Pair) -> bool:
    if key in _SOURCES_OF_KEYS:
        return any(all(name in each.get("sources", {}) for each in inputs) for name in _SOURCES_OF_KEYS[key])
    return key in _MODEL_PATHS and all("weights" in each.get("model", {}) for each in inputs)


def _has_effect(key: str, values: tuple[Any, Any], one: History, other: History) -> bool:
    if key == "resume":  # auto and never only say what happens to what is there.
        return any(value not in ("auto", "never") for value in values)
    if key == "dropout_masks":
        return {"bytes": "torch"}.get(values[0], values[0]) != {"bytes": "torch"}.get(values[1], values[1]) and (
            _has_dropout(one) or _has_dropout(other)
        )
    return key not in OutputKeys.model_fields


def _has_dropout(history: History) -> bool:
    return history.settings.get("dropout") != 0 or bool(history.settings.get("lora_dropout"))


def _draws_by_process(history: History) -> bool:
    """Whether dropout masks depend on how a batch is dealt to processes."""
    return history.settings.get("dropout_masks") in ("torch", "bytes") and _has_dropout(history)


def _effects_of_key(key: str, draws_by_process: bool) -> frozenset[Effect]:
    if key in _EFFECTS:
        return frozenset(_EFFECTS[key])
    if key in MemoryKeys.model_fields:
        return _FORWARD if draws_by_process else _ROUNDING
    if key in DataKeys.model_fields:
        return frozenset({"examples"})
    if key in Recipe.model_fields:
        return frozenset({"forward", "update"})
    return frozenset({"examples", "forward", "evaluation"})  # A task's own.


def _compare_models(inputs: Pair) -> Iterator[Difference]:
    for name in ("weights", "config", "adapter"):
        if values := _compare(inputs, "model", name):
            yield Difference("model", name, values, frozenset({"forward"}))
    if values := _compare(inputs, "processor"):
        yield Difference("model", "tokenizer or image processor", values, frozenset({"examples"}))
    if values := _compare(inputs, "task"):
        yield Difference("versions", "task", values, _ANYTHING)


def _compare_environments(one: Starts, other: Starts, last_step: int, draws_by_process: bool) -> Iterator[Difference]:
    """Versions, devices and topologies of the starts that made a step, of both runs, for each step from which they differ."""
    seen: set[str] = set()
    for before in sorted({step for step, _ in (*one, *other) if step < last_step} | {0}):
        for each in _compare_two_environments((_find(one, before), _find(other, before)), before + 1, draws_by_process):
            if each.name not in seen:
                seen.add(each.name)
                yield each


def _find(starts: Starts, before: int) -> Mapping[str, Any]:
    """The environment in which the step after `before` was made."""
    return next((environment for step, environment in reversed(starts) if step <= before), starts[0][1])


def _compare_two_environments(pair: Pair, step: int, draws_by_process: bool) -> Iterator[Difference]:
    for name in _list_names(pair, "packages"):
        if values := _compare(pair, "packages", name):
            yield Difference("versions", name, values, _OF_PACKAGES.get(name, _ROUNDING), step)
    if values := _compare(pair, "git_revision"):
        yield Difference("versions", "git_revision", values, _ANYTHING, step)
    for name in ("python", "platform"):
        if values := _compare(pair, name):
            yield Difference("versions", name, values, _ROUNDING, step)
    for name in _list_names(pair, "topology"):
        if values := _compare(pair, "topology", name):
            is_device = name in ("device", "device_name")
            effects = _FORWARD if draws_by_process and not is_device else _ROUNDING
            yield Difference("device" if is_device else "topology", name, values, effects, step)


def _list_names(pair: Pair, key: str) -> list[str]:
    return list(dict.fromkeys(name for each in pair for name in each.get(key, {})))


def _compare_restarts(one: Starts, other: Starts, last_step: int) -> Iterator[Difference]:
    restarts = [[step for step, _ in starts[1:] if step < last_step] for starts in (one, other)]
    if restarts[0] != restarts[1]:
        first = min(set(restarts[0]) ^ set(restarts[1]), default=0)
        yield Difference("starts", "restarts after steps", (restarts[0], restarts[1]), _ROUNDING, first + 1)
