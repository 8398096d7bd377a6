"""The recipe: every training setting, typed and validated before anything heavy is imported.

A recipe is a flat YAML file. A flag beats the recipe, the recipe beats the default, and every resolved value remembers
which of the three it came from::

    accelerate launch training/run.py --config training/recipes/demo.yaml --learning_rate 3e-5

All problems of a recipe are reported at once, each with the nearest valid name or the bound it breaks.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

Source = Literal["flag", "recipe", "default"]

# More examples in one step than any published fine-tuning run; beyond it a number is a typing mistake.
MAX_TRAIN_BATCH_SIZE = 1_000_000


class RecipeError(ValueError):
    """A recipe that can't be trained.

    Attributes:
        problems: one line for each fault, all of them.
        remainder: the recipe of the keys that are valid, if they make one, so that `check` can look at what they name.
    """

    def __init__(self, origin: str, problems: Sequence[str], remainder: Recipe | None = None) -> None:
        self.origin = origin
        self.problems = list(problems)
        self.remainder = remainder
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__("\n  ".join([f"{count} in {origin}:", *self.problems]))


def _reject_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("must be a number, got a boolean")
    return value


def _reject_non_finite(value: object) -> object:
    _reject_bool(value)
    if isinstance(value, str):
        try:  # YAML 1.1 reads 5e-5 (no dot) as text.
            value = float(value)
        except ValueError:
            raise ValueError(f"must be a number, got {value!r}") from None
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"must be a finite number, got {value}")
    return value


def _to_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _to_precision(value: object) -> object:
    return "no" if value is False else value  # YAML 1.1 reads a bare `no` as false.


Integer = Annotated[int, BeforeValidator(_reject_bool)]
Number = Annotated[float, BeforeValidator(_reject_non_finite)]
Files = Annotated[tuple[str, ...], BeforeValidator(_to_list)]

SCHEDULER_TYPES = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "reduce_lr_on_plateau",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
    "greedy",
]


class Recipe(BaseModel):
    """What is trained. Keys have the names that `transformers` users know; topology is never among them."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), coerce_numbers_to_str=True)

    task: Literal["text_classification"] = Field("text_classification", description="what the model learns to do")

    # Model
    model_name_or_path: str = Field(min_length=1, description="a local model folder or a hub name")
    model_revision: str = Field("main", description="the model's branch, tag or commit on the hub")
    trust_remote_code: bool = Field(
        False, description="run Python code that comes with the model; off unless you say so"
    )
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3"] | None = Field(
        None, description="attention kernel; none lets transformers choose"
    )
    tokenizer_name: str | None = Field(None, description="a tokenizer other than the model's own")
    dropout: Annotated[Number, Field(ge=0, lt=1)] | None = Field(
        None, description="sets every dropout probability of the model; none keeps the model's own"
    )

    # Data
    dataset_name: str | None = Field(None, description="a data set's name on the hub, or a save_to_disk folder")
    dataset_config_name: str | None = Field(None, description="the data set's configuration, such as 'cola' of glue")
    train_file: Files | None = Field(None, description="CSV, TSV, JSON Lines or Parquet files; globs allowed")
    validation_file: Files | None = Field(None, description="as train_file; none splits the training data")
    test_file: Files | None = Field(None, description="as train_file; evaluated once, at the end")
    train_split: str = Field("train", min_length=1, description="name of the split of a hub data set to train on")
    validation_split: str | None = Field(
        None, description="name of the hub split to evaluate on; none splits the training data"
    )
    text_column: str = Field("text", min_length=1, description="column with the text")
    text_pair_column: str | None = Field(None, description="column with the second text of a pair")
    label_column: str | Files = Field("label", description="column with the label, or several columns of 0/1")
    problem_type: Literal["single_label_classification", "multi_label_classification", "regression"] = Field(
        "single_label_classification", description="the kind of label, in transformers' words"
    )
    max_length: Annotated[Integer, Field(ge=2)] = Field(512, description="tokens an example is cut to")
    validation_fraction: Annotated[Number, Field(gt=0, lt=1)] = Field(
        0.1, description="share of the training data held out when there is no validation data; stratified by label"
    )
    max_train_samples: Annotated[Integer, Field(ge=1)] | None = Field(
        None, description="a seeded subset of the training data"
    )
    max_eval_samples: Annotated[Integer, Field(ge=1)] | None = Field(
        None, description="a seeded subset of the validation data"
    )

    # The mathematics of a step
    train_batch_size: Annotated[Integer, Field(ge=1, le=MAX_TRAIN_BATCH_SIZE)] = Field(
        32, description="examples in one step, over all processes (DeepSpeed's word for the global batch)"
    )
    learning_rate: Annotated[Number, Field(gt=0)] = Field(5e-5, description="peak learning rate of AdamW")
    weight_decay: Annotated[Number, Field(ge=0)] = Field(0.0, description="decoupled decay; never on biases and norms")
    lr_scheduler_type: SCHEDULER_TYPES = Field("linear", description="a name of transformers.get_scheduler")
    num_warmup_steps: Annotated[Integer, Field(ge=0)] = Field(0, description="steps of linear warm-up")
    warmup_ratio: Annotated[Number, Field(ge=0, le=1)] = Field(0.0, description="warm-up as a share of all steps")
    num_train_epochs: Annotated[Number, Field(gt=0)] = Field(3.0, description="passes over the training data")
    max_train_steps: Annotated[Integer, Field(ge=1)] | None = Field(
        None, description="steps to train; beats num_train_epochs"
    )
    max_grad_norm: Annotated[Number, Field(ge=0)] = Field(
        1.0, description="global norm to clip gradients to; 0 is no clipping"
    )
    label_smoothing_factor: Annotated[Number, Field(ge=0, lt=1)] = Field(
        0.0, description="share of the label spread evenly"
    )
    class_weights: Literal["balanced"] | dict[str, Annotated[Number, Field(gt=0)]] | None = Field(
        None, description="'balanced', or a weight for each label"
    )
    adam_beta1: Annotated[Number, Field(ge=0, lt=1)] = Field(0.9, description="decay of AdamW's first moment")
    adam_beta2: Annotated[Number, Field(ge=0, lt=1)] = Field(0.999, description="decay of AdamW's second moment")
    adam_epsilon: Annotated[Number, Field(gt=0)] = Field(1e-8, description="AdamW's epsilon")
    length_window: Annotated[Integer, Field(ge=1)] = Field(
        64,
        description="global batches among which shuffled examples of near-equal length meet; 1 is plain random order",
    )
    mixed_precision: Annotated[Literal["no", "bf16", "fp16"], BeforeValidator(_to_precision)] = Field(
        "no", description="autocast of the forward; fp16 may skip steps"
    )
    seed: Annotated[Integer, Field(ge=0, lt=2**63)] = Field(
        42, description="of the split, the order, the new head and dropout"
    )
    dropout_masks: Literal["bytes", "torch"] = Field(
        "bytes",
        description="how a CPU draws dropout: from random bytes, which is much faster, or as torch does; "
        "other elements are dropped, as likely",
    )

    # Memory and speed: these may change between machines and change nothing that is learned
    per_device_batch_size: Annotated[Integer, Field(ge=1)] = Field(16, description="most examples in one micro-batch")
    per_device_batch_tokens: Annotated[Integer, Field(ge=1)] | None = Field(
        None, description="most padded tokens in one micro-batch"
    )
    dataloader_num_workers: Annotated[Integer, Field(ge=0, le=512)] = Field(
        0, description="loader processes of each rank"
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass to save memory")
    torch_compile: bool = Field(False, description="compile the model's layers")

    # Evaluation, checkpoints, reports
    eval_steps: Literal["epoch"] | Annotated[Integer, Field(ge=1)] = Field(
        "epoch", description="steps between evaluations"
    )
    metric_for_best_model: str | None = Field(None, description="metric that chooses `best`, such as eval_accuracy")
    early_stopping_patience: Annotated[Integer, Field(ge=1)] | None = Field(
        None, description="evaluations without a better metric before training ends"
    )
    checkpointing_steps: Literal["epoch"] | Annotated[Integer, Field(ge=1)] | None = Field(
        None, description="steps between checkpoints; none writes them only for the best metric, or when asked to stop"
    )
    save_total_limit: Annotated[Integer, Field(ge=1)] | None = Field(
        None, description="checkpoints kept, the best one besides"
    )
    resume: str = Field(
        "auto", min_length=1, description="auto (go on if the run directory can), never, or a checkpoint's path"
    )
    output_dir: str = Field("runs/onecurve", min_length=1, description="the run directory")
    report_to: Literal["none", "tensorboard", "wandb", "mlflow"] = Field(
        "none", description="tracker to log to as well"
    )
    hang_timeout_seconds: Annotated[Number, Field(gt=0)] = Field(
        1800.0,
        description="a silent step longer than this ends the run; start, first step and saves have ten times as long",
    )


# Keys that decide how fast and where a run goes, not what it learns. A resumed run may change them.
FREE_KEYS = frozenset(
    {
        "per_device_batch_size",
        "per_device_batch_tokens",
        "dataloader_num_workers",
        "gradient_checkpointing",
        "torch_compile",
        "attn_implementation",
        "checkpointing_steps",
        "save_total_limit",
        "resume",
        "output_dir",
        "report_to",
        "hang_timeout_seconds",
    }
)


@dataclass(frozen=True)
class ResolvedRecipe:
    """A recipe and where each of its values came from.

    Attributes:
        eval_only: evaluate what was trained instead of training; a flag of one start, no setting of a run.
    """

    recipe: Recipe
    sources: Mapping[str, Source]
    eval_only: bool = False

    def to_yaml(self) -> str:
        """The text of `config.yaml`: itself a recipe, each value's source in a comment behind it."""
        lines = ["# Every resolved value and its source. This file is itself a recipe: train it again with --config."]
        for key, value in self.recipe.model_dump(mode="json").items():
            text = yaml.safe_dump(value, default_flow_style=True, width=math.inf, allow_unicode=True)
            if yaml.safe_load(text.removesuffix("...\n").strip(" \n")) != value:  # YAML folds some rare spaces.
                text = yaml.safe_dump(value, default_flow_style=True, width=math.inf)
            text = text.removesuffix("...\n").rstrip("\n")  # A lone scalar is dumped with a document end behind it.
            lines.append(f"{key}: {text}  # {self.sources[key]}")
        return "\n".join(lines) + "\n"


def parse_arguments(arguments: Sequence[str]) -> tuple[str | None, dict[str, str]]:
    """Split `--config FILE --key value --key=value --eval_only` into the recipe's path and the overriding flags.

    Raises:
        RecipeError: for a word that is no flag, a flag without a value, or one given twice.
    """
    path: str | None = None
    flags: dict[str, str] = {}
    problems: list[str] = []
    words = list(arguments)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            problems.append(f"{word!r}: expected --key value")
            continue
        key, equals, value = word[2:].partition("=")
        key = key.replace("-", "_")
        if key == "eval_only" and not equals:
            flags[key] = "true"
            continue
        if not equals:
            if not words or words[0].startswith("--"):
                problems.append(f"--{key}: needs a value")
                continue
            value = words.pop(0)
        if key == "config":
            if path is not None:
                problems.append("--config: given twice")
            path = value
        elif key in flags:
            problems.append(f"--{key}: given twice")
        else:
            flags[key] = value
    if problems:
        raise RecipeError("the command line", problems)
    return path, flags


def load_recipe(path: str | None, flags: Mapping[str, str] | None = None) -> ResolvedRecipe:
    """Read a recipe file, put the flags over it and validate the whole.

    Raises:
        RecipeError: naming every unknown key, wrong type and broken bound at once.
    """
    flags = dict(flags or {})
    eval_only = flags.pop("eval_only", "false").lower() == "true"
    from_file = _read_yaml(path) if path is not None else {}
    origin = path if path is not None else "the command line"
    # A flag is text; YAML gives it the type that the same words would have in the recipe.
    from_flags = {key: _parse_flag(key, value) for key, value in flags.items()}
    merged = {**from_file, **from_flags}
    problems = [_describe_unknown(key) for key in merged if key not in Recipe.model_fields]
    known = {key: value for key, value in merged.items() if key in Recipe.model_fields}
    try:
        recipe = Recipe(**known)
    except ValidationError as error:
        problems += _describe_errors(error)
        wrong = {str(detail["loc"][0]) for detail in error.errors() if detail["loc"]}
        remainder = _build_remainder({key: value for key, value in known.items() if key not in wrong})
        if remainder is not None:  # Of two keys that contradict each other, both must be known.
            problems += [
                line for line in find_contradictions(remainder) if not wrong.intersection(re.findall(r"\w+", line))
            ]
        raise RecipeError(origin, problems, remainder) from None
    problems += find_contradictions(recipe)
    if problems:
        raise RecipeError(origin, problems, recipe)
    sources: dict[str, Source] = {
        key: "flag" if key in from_flags else "recipe" if key in from_file else "default" for key in Recipe.model_fields
    }
    return ResolvedRecipe(recipe, sources, eval_only)


def _build_remainder(values: Mapping[str, Any]) -> Recipe | None:
    try:
        return Recipe(**values)
    except ValidationError:  # A key that every recipe needs is among the wrong ones.
        return None


def find_contradictions(recipe: Recipe) -> list[str]:
    """Problems between keys that are each valid alone, one line each."""
    problems = []
    if recipe.dataset_name is None and recipe.train_file is None:
        problems.append("train_file or dataset_name: one of them must say what to train on")
    if recipe.dataset_name is not None and recipe.train_file is not None:
        problems.append("train_file and dataset_name: give one of them, not both")
    if recipe.num_warmup_steps and recipe.warmup_ratio:
        problems.append("num_warmup_steps and warmup_ratio: give one of them, not both")
    if recipe.per_device_batch_tokens is not None and recipe.per_device_batch_tokens < recipe.max_length:
        problems.append(
            f"per_device_batch_tokens: {recipe.per_device_batch_tokens} cannot hold one example of max_length "
            f"{recipe.max_length}; raise it to at least {recipe.max_length} or lower max_length"
        )
    if recipe.early_stopping_patience is not None and recipe.metric_for_best_model is None:
        problems.append("early_stopping_patience: needs metric_for_best_model to say what 'better' means")
    return problems


def find_nearest(name: str, names: Sequence[str]) -> str | None:
    """The name that `name` was most likely meant to be, if any is near."""
    matches = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return matches[0] if matches else None


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(path, ["no such file"]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(path, [f"cannot be read: {error}"]) from None
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(path, ["not valid YAML: " + " ".join(str(error).split())]) from None
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise RecipeError(path, ["must be a flat mapping of keys to values, one `key: value` a line"])
    return content


def _parse_flag(key: str, text: str) -> object:
    field = Recipe.model_fields.get(key)
    if field is not None and field.annotation in (str, str | None):
        return None if text == "null" else text  # A revision 0123 or a folder 2026-11-23 is text, whatever YAML thinks.
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _describe_unknown(key: str) -> str:
    nearest = find_nearest(key, list(Recipe.model_fields))
    hint = f"did you mean {nearest}?" if nearest else "docs/recipes.md lists the valid keys"
    return f"{key}: unknown key; {hint}"


def _describe_errors(error: ValidationError) -> list[str]:
    by_key: dict[str, list[str]] = {}
    for detail in error.errors():
        key = str(detail["loc"][0]) if detail["loc"] else "recipe"
        message = detail["msg"].removeprefix("Value error, ")
        if detail["type"] == "missing":
            message = "is required"
        elif not message.startswith("must be"):
            message = f"{message[0].lower()}{message[1:]}, got {_shorten(detail['input'])}"
        if message not in by_key.setdefault(key, []):
            by_key[key].append(message)
    return [f"{key}: {_with_choices(key, ' or '.join(messages))}" for key, messages in by_key.items()]


def _with_choices(key: str, message: str) -> str:
    """Add the nearest of a key's literal choices to a message about a wrong value."""
    field = Recipe.model_fields.get(key)
    choices = [choice for choice in get_args(field.annotation) if isinstance(choice, str)] if field else []
    value = message.rpartition("got ")[2].strip("'")
    nearest = find_nearest(value, choices)
    return f"{message}; did you mean {nearest}?" if nearest else message


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
